"""
The Triton path of the index loss: KL from the layer's attention to the indexer, with its gradients.
The header of kernels.py explains the names. attention.index_loss_eager is the same in plain
PyTorch.

    loss = index_loss(q, k, lse, index_q, …, union, …)    # for attention.index_loss
"""
import functools
import math

import torch
from torch import Tensor

from kernels import (HIDDEN, LOG2_E, UnionList, _add_partial_gradients, _attention_sizes,
                     _dot_precision, _index_scores, _index_sizes, _keys_of_tile, _list_pointers,
                     _load_block, _load_keys, _load_visible, _options_like, _positions, _rows,
                     _store_block, _tile_groups, attention_tile, jit, tl, triton)


@jit
def _index_loss_kernel(
        p_q, p_k, p_lse, p_index_q, p_index_k, p_index_w, p_index_b, p_tau, p_loss,
        p_dindex_q, p_dindex_k_parts, p_dindex_w, p_dindex_b, p_dtau, p_slots,
        p_offsets, p_keys, p_query_bits, p_pos, p_start,
        scale, index_scale, tile0, n_tiles, longest, T, S, pos_stride,
        H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
        Hi: tl.constexpr, DI: tl.constexpr, DIP: tl.constexpr, RI: tl.constexpr,
        TQ: tl.constexpr, LIST_TQ: tl.constexpr, SIGMOID: tl.constexpr, FAST: tl.constexpr,
        DENSE: tl.constexpr, HAS_START: tl.constexpr, GRADS: tl.constexpr,
        PRECISION: tl.constexpr, BN: tl.constexpr):
    """
    KL(p ‖ softmax(τ·I)) of TQ queries and, with GRADS, its gradients. Grid (n_tiles, B), tiles
    from tile0 on. The teacher p is the mean over all heads of exp(q·k / √d - LSE). The student
    is the softmax of τ·I. The keys are walked over twice, first for the student's log Z, then for
    everything else.

    Three systems of rows, each with its own names:

        rows of      number   row is                      names          what has these rows
        queries      TQ       query                       query, t       p, I, the loss, dτ
        the indexer  TQ·RI    query · RI + indexer head   index_*        q^I, w, their gradients
        attention    TQ·RP    query · RP + head           attention_*    q, LSE of one KV head

    The lists are attention's, of LIST_TQ ≥ TQ queries. What only other queries of a list chose is
    masked. The gradient of k^I is summed over tiles like dk in _attend_backward_kernel.
    """
    # 1. the three row systems
    R: tl.constexpr = H // G
    i_tile = tl.program_id(0) + tile0
    i_b = tl.program_id(1).to(tl.int64)
    i_part = i_b * n_tiles + tl.program_id(0)
    query, _, t = _rows(i_tile, TQ, 1)
    query += (i_tile * TQ) % LIST_TQ  # within the list's tile
    pos, start = _load_visible(p_pos, p_start, t, i_b, T, pos_stride, HAS_START)
    _, index_head, index_t = _rows(i_tile, TQ, RI)
    index_live = (index_t < T) & (index_head < Hi)
    index_row = index_t * Hi + index_head
    _, attention_head, attention_t = _rows(i_tile, TQ, RP)
    attention_live = (attention_t < T) & (attention_head < R)
    p_q += i_b * T * H * D
    p_k += i_b * S * G * D
    p_lse += i_b * T * H
    p_loss += i_b * T
    p_dtau += i_b * T
    p_index_q += i_b * T * Hi * DI
    p_index_k += i_b * S * DI
    p_index_w += i_b * T * Hi
    p_dindex_q += i_b * T * Hi * DI
    p_dindex_k_parts += i_part * longest * DI
    p_dindex_w += i_b * T * Hi
    p_dindex_b += i_b * T * Hi
    p_slots += i_part * S
    b_index_q = _load_block(p_index_q, index_row, index_live, DI, DIP)  # (TQ·RI, DIP)
    # (TQ·RI,)
    b_w = tl.load(p_index_w + index_row, mask=index_live, other=0.0).to(tl.float32)
    # (TQ·RI,)
    b_bias = tl.load(p_index_b + index_head, mask=index_head < Hi, other=0.0).to(tl.float32)
    tau = tl.load(p_tau).to(tl.float32)
    first, n = _keys_of_tile(p_offsets, p_pos, p_start, i_tile, i_b, T, pos_stride,
                             TQ, LIST_TQ, DENSE, HAS_START)

    # 2. first walk: the student's LSE
    b_max = tl.full([TQ], HIDDEN, tl.float32)
    b_sum = tl.zeros([TQ], tl.float32)
    for s0 in range(0, n, BN):
        key, exists, chosen = _load_keys(p_keys, p_query_bits, first, s0 + tl.arange(0, BN), n,
                                         query, pos, start, DENSE)
        b_index_k = _load_block(p_index_k, key, exists, DI, DIP)  # (BN, DIP)
        b_z, b_a, b_scores = _index_scores(b_index_q, b_index_k, b_w, b_bias, index_scale,
                                           TQ, RI, BN, SIGMOID, FAST, PRECISION)
        b_logits = tl.where(chosen, tau * b_scores, HIDDEN)  # (TQ, BN)
        new_max = tl.maximum(b_max, tl.max(b_logits, 1))
        b_exp = tl.where(chosen, tl.exp(b_logits - new_max[:, None]), 0.0)
        b_sum = b_sum * tl.exp(b_max - new_max) + tl.sum(b_exp, 1)
        b_max = new_max
    b_log_z = b_max + tl.log(tl.maximum(b_sum, 1e-30))  # (TQ,)

    # 3. second walk
    b_loss = tl.zeros([TQ], tl.float32)
    b_dtau = tl.zeros([TQ], tl.float32)
    b_dindex_q = tl.zeros([TQ * RI, DIP], tl.float32)
    b_dw = tl.zeros([TQ * RI], tl.float32)
    b_dbias = tl.zeros([TQ * RI], tl.float32)
    for s0 in range(0, n, BN):
        slot = s0 + tl.arange(0, BN)
        key, exists, chosen = _load_keys(p_keys, p_query_bits, first, slot, n,
                                         query, pos, start, DENSE)
        # 3a. the teacher
        b_teacher = tl.zeros([TQ, BN], tl.float32)
        for i_g in range(G):
            attention_row = attention_t * H + i_g * R + attention_head
            b_q = _load_block(p_q, attention_row, attention_live, D, DP)  # (TQ·RP, DP)
            # (TQ·RP,), padding rows 1e30: they add exp(S - 1e30) = 0
            lse = tl.load(p_lse + attention_row, mask=attention_live, other=1e30) * LOG2_E
            b_k = _load_block(p_k, key * G + i_g, exists, D, DP)  # (BN, DP)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
            b_p = tl.exp2(b_s - lse[:, None])  # (TQ·RP, BN)
            b_teacher += tl.sum(tl.reshape(b_p, (TQ, RP, BN)), 1)
        b_teacher = tl.where(chosen, b_teacher * (1.0 / H), 0.0)

        # 3b. the student and the loss
        b_index_k = _load_block(p_index_k, key, exists, DI, DIP)  # (BN, DIP)
        b_z, b_a, b_scores = _index_scores(b_index_q, b_index_k, b_w, b_bias, index_scale,
                                           TQ, RI, BN, SIGMOID, FAST, PRECISION)
        b_student = tl.where(chosen, tl.exp(tau * b_scores - b_log_z[:, None]), 0.0)  # (TQ, BN)
        log_p = tl.log(tl.where(b_teacher > 0, b_teacher, 1.0))
        b_loss += tl.sum(b_teacher * (log_p - tau * b_scores + b_log_z[:, None]), 1)

        # 3c. the gradients; 1 / √di is left to the caller
        if GRADS:
            b_g = b_student - b_teacher  # ∂KL/∂(τ·I)
            b_dtau += tl.sum(b_g * b_scores, 1)
            b_g = tl.broadcast_to((b_g * tau)[:, None, :], (TQ, RI, BN))
            b_g = tl.reshape(b_g, (TQ * RI, BN))
            b_dw += tl.sum(b_g * b_a, 1)
            if SIGMOID:
                b_dz = b_g * b_a * (b_w[:, None] - b_w[:, None] * b_a)
            else:
                b_dz = tl.where(b_z > 0, b_g * b_w[:, None], 0.0)
            b_dbias += tl.sum(b_dz, 1)
            b_dz = b_dz.to(b_index_k.dtype)
            b_dindex_q = tl.dot(b_dz, b_index_k, b_dindex_q, input_precision=PRECISION)
            b_dindex_k = tl.dot(tl.trans(b_dz), b_index_q, input_precision=PRECISION)
            _store_block(p_dindex_k_parts, slot, exists, b_dindex_k, DI, DIP)
            tl.store(p_slots + key, slot, mask=exists)

    # 4. what was summed over the keys
    tl.store(p_loss + t, b_loss, mask=t < T)
    if GRADS:
        tl.store(p_dtau + t, b_dtau, mask=t < T)
        _store_block(p_dindex_q, index_row, index_live, b_dindex_q, DI, DIP)
        tl.store(p_dindex_w + index_row, b_dw, mask=index_live)
        tl.store(p_dindex_b + index_row, b_dbias, mask=index_live)


@torch.library.custom_op("gsa::index_loss", mutates_args=())
def _index_loss(q: Tensor, k: Tensor, lse: Tensor, index_q: Tensor, index_k: Tensor,
                index_w: Tensor, index_b: Tensor, log_tau: Tensor, tile_queries: int,
                longest: int, offsets: Tensor | None, keys: Tensor | None,
                query_bits: Tensor | None, pos: Tensor, start: Tensor | None, activation: str,
                want_grads: bool) -> list[Tensor]:
    """The loss () and, if wanted, its gradients in index_q, index_k, index_w, index_b, log_tau."""
    B, T = q.shape[:2]
    S, di = index_k.shape[1:]
    union = UnionList(tile_queries, longest, offsets, keys, query_bits)
    TQ = attention_tile(q, k, index_q)
    tiles = triton.cdiv(T, TQ)
    tau = log_tau.float().exp()
    new = functools.partial(torch.empty, device=q.device, dtype=torch.float32)
    loss = new(B, T)
    names = "p_dindex_q p_dindex_w p_dindex_b p_dtau p_dindex_k_parts p_slots".split()
    pointers = dict.fromkeys(names, loss)  # stand-ins, not written
    groups = [(0, tiles)]
    if want_grads:
        dq = new(index_q.shape)
        dk = new(index_k.shape).zero_()
        dw = new(index_w.shape)
        db = new(index_w.shape)
        dtau = new(B, T)
        groups = _tile_groups(tiles, longest, 4 * di, B, S)
        dk_parts = new(B * groups[0][1] * longest * di)
        pointers = dict(p_dindex_q=dq, p_dindex_w=dw, p_dindex_b=db, p_dtau=dtau,
                        p_dindex_k_parts=dk_parts)
    for tile0, n_tiles in groups:
        if want_grads:
            slots = torch.full((B, n_tiles, S), -1, device=q.device, dtype=torch.int32)
            pointers["p_slots"] = slots
        _index_loss_kernel[n_tiles, B](
            p_q=q, p_k=k, p_lse=lse, p_index_q=index_q, p_index_k=index_k, p_index_w=index_w,
            p_index_b=index_b, p_tau=tau, p_loss=loss, **pointers,
            **_list_pointers(union, pos), **_positions(pos, start),
            **_attention_sizes(q, k, TQ), **_index_sizes(index_q, activation, TQ),
            tile0=tile0, n_tiles=n_tiles, longest=longest, LIST_TQ=tile_queries,
            GRADS=want_grads, PRECISION=_dot_precision(), **_options_like(q, "index loss"))
        if want_grads:
            _add_partial_gradients(dk[:, :, None], dk_parts, slots, longest)
    if not want_grads:
        return [loss.mean()]
    gradients = (dq / math.sqrt(di), dk / math.sqrt(di), dw, db.sum((0, 1)), dtau.sum() * tau)
    inputs = (index_q, index_k, index_w, index_b, log_tau)
    return [loss.mean()] + [(g / (B * T)).to(x.dtype) for g, x in zip(gradients, inputs)]


@_index_loss.register_fake
def _(q, k, lse, index_q, index_k, index_w, index_b, log_tau, *more):
    want_grads = more[-1]
    inputs = (index_q, index_k, index_w, index_b, log_tau) if want_grads else ()
    return [lse.new_empty(()), *map(torch.empty_like, inputs)]


def _index_loss_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _index_loss_gradients(ctx, grads):
    scaled = [g * grads[0].to(g.dtype) for g in ctx.saved_tensors]
    return None, None, None, *scaled, *[None] * 9


_index_loss.register_autograd(_index_loss_gradients, setup_context=_index_loss_setup)


def index_loss(q, k, lse, index_q, index_k, index_w, index_b, log_tau, union, pos, start,
               activation, want_grads):
    """
    Mean over the queries of KL(p ‖ softmax(τ·I)), in nats: p is the mean over heads of the
    attention, I the indexer's scores (Eq. 7), both over the keys of the union list; τ =
    exp(log_tau). Returns the loss (), differentiable in the five tensors from index_q to log_tau.

    q (B, T, H, d), k (B, S, G, d), lse (B, T, H) as attend returned it: the teacher, which gets no
    gradient. index_q to index_b, activation, pos, start: as in select. log_tau (). union: that of
    attend. want_grads: the gradients are computed together with the loss; False spares them.
    """
    teacher = [x.detach().contiguous() for x in (q, k, lse)]
    student = [x.contiguous() for x in (index_q, index_k, index_w, index_b, log_tau)]
    return _index_loss(*teacher, *student, *union, pos, start, activation, want_grads)[0]
