"""
The PyTorch path of attention.py: the same results as its eager equations with O(tile·S) memory.
It is what runs on a CPU, and it needs nothing but PyTorch.

Selection (tiled_select.py) works on tiles of neighbouring queries. Attention and the index loss,
here, work on blocks of queries, of which there are two kinds:

    DenseBlock    its queries share a range of keys, all that they see, and a mask over it
    GatheredKeys  each of its queries has keys of its own, read where they are by sparse products

Both offer the same three operations (add_products, weighted_sum, scatter_add), so attention and
the loss are written once. A block is dense where its queries see few keys; see is_gathered.
Everything is computed at least in fp32.
"""
import functools
import itertools
import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

TILE_QUERIES = 256  # queries per tile
DENSE_QUERIES = 64  # queries per dense block, whose logits then fit the CPU's cache
GATHERED_LOGITS = 1 << 21  # most logits of a block with gathered keys
GATHERED_COST = 3  # reading a gathered key costs as much as 3 keys of a dense block, on a CPU

# Added to what must not be selected or attended to. It is finite, since inf - inf = NaN
HIDDEN = -1e30


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------
# Tiles: neighbouring queries, and the keys that they see

class Tile(NamedTuple):
    """Some queries. They see no key outside begin … end-1; all see keys low … high-1."""
    query_begin: int
    query_end: int  # the first query behind the tile
    begin: int
    end: int
    low: int
    high: int

    @property
    def queries(self):
        return slice(self.query_begin, self.query_end)

    @property
    def keys(self):
        return slice(self.begin, self.end)


def make_tiles(visible):
    """The queries in tiles of TILE_QUERIES, by one copy from the device for all of them."""
    pos, start = visible.pos, visible.first
    begin = torch.arange(0, pos.size(1), TILE_QUERIES, device=pos.device)  # (tiles,)
    final = (begin + TILE_QUERIES).clamp(max=pos.size(1)) - 1
    # Positions and starts do not fall along T: a tile's extremes are at its ends
    columns = (begin, final + 1,
               start[:, begin].amin(0), pos[:, final].amax(0) + 1,
               start[:, final].amax(0), pos[:, begin].amin(0) + 1)
    return [Tile(*row) for row in torch.stack(columns, 1).tolist()]


def visible_bias(visible, tile):
    """
    What to add to a tile's scores: 0 where a key is visible, else HIDDEN.
    (1 or B, queries, end - begin). On a CPU this is 20 times faster than masked_fill.
    """
    mask = visible.mask(tile.queries, tile.begin, tile.end)
    return mask.float().sub_(1).mul_(-HIDDEN)  # True: 0 · 1e30, False: -1 · 1e30


def selected_bias(selection, tile):
    """The same for the selected keys: 0 where a key is selected, else HIDDEN."""
    if selection.indices is None:
        return visible_bias(selection.visible, tile)
    indices = selection.indices[:, tile.queries].long()  # (B, queries, k)
    width = tile.end - tile.begin
    at = torch.where(indices < 0, width, indices - tile.begin)  # -1 goes to column `width`
    bias = torch.full((*indices.shape[:2], width + 1), HIDDEN, device=indices.device)
    return bias.scatter_(2, at, 0.0)[..., :width]  # (B, queries, end - begin)


# --------------------------------------------------------------------------------------------------
# Blocks of queries, and the products of their rows with keys

class Workspace(dict):
    """
    Memory that one block after the other uses: to map new memory into the process each time took
    a CPU up to a tenth of the time.
    """

    def __call__(self, name, like, *shape):
        """An uninitialised tensor like `like`, in the memory of the last one of this name."""
        n = math.prod(shape)
        if name not in self or self[name].numel() < n:
            self.pop(name, None)  # free the old one first
            self[name] = like.new_empty(1 << n.bit_length())  # with room: later blocks are larger
        return self[name][:n].view(shape)


class Block:
    """
    Neighbouring queries and their keys. A group of queries shares its keys; a block has

        groups   number of groups: B for a DenseBlock, B times its queries for GatheredKeys
        bias     (groups, n, U), 0 or HIDDEN, for n queries and U keys of each group
        queries  slice of the queries 0 … T-1

    and the operations add_products, weighted_sum and scatter_add. The rows of a group's matrix
    product with one KV head are its n queries times the R = H / G heads that share this KV head:
    tensors are (groups, G, R·n, d).
    """

    def rows(self, x, G):
        """The block's queries of x as rows: (B, T, H, d) -> (groups, G, R·n, d)."""
        x = x[:, self.queries]  # (B, queries, H, d)
        x = x.reshape(self.groups, self.bias.size(1), G, x.size(2) // G, x.size(3))
        x = x.permute(0, 2, 3, 1, 4)  # (groups, G, R, n, d)
        return x.flatten(2, 3)

    def store(self, x, out):
        """The inverse: rows x (groups, G, R·n, d) into the block's queries of out (B, T, H, d)."""
        out = out[:, self.queries]  # (B, queries, H, d)
        n, G = self.bias.size(1), x.size(1)
        x = x.view(len(out), -1, G, x.size(2) // n, n, x.size(3))  # (B, groups/B, G, R, n, d)
        x = x.permute(0, 1, 4, 2, 3, 5)  # (B, groups/B, n, G, R, d)
        out.view(x.shape).copy_(x)

    def logits(self, q, k, workspace):
        """
        q·k / √d, plus HIDDEN where a key is not selected.
        Rows q (groups, G, R·n, d), k (B, S, G, d) -> (groups, G, R·n, U).
        """
        s = workspace("logits", q, *q.shape[:3], self.bias.size(2))
        s.view(self.groups, -1, *self.bias.shape[1:]).copy_(self.bias[:, None])  # for every head
        return self.add_products(q, k, s, 1 / math.sqrt(q.size(-1)))


class DenseBlock(Block):
    """Queries that share a range of keys: dense products, sequence by sequence."""

    def __init__(self, queries, keys, bias):
        self.queries = queries
        self.keys = keys  # slice of the positions 0 … S-1
        self.bias = bias  # (B, n, U)
        self.groups = len(bias)

    def add_products(self, q, k, out, alpha=1):
        """out (groups, G, R·n, U) += α·q·k. Rows q (groups, G, R·n, d), k (B, S, G, d)."""
        for i in range(self.groups):
            out[i].baddbmm_(q[i], k[i, self.keys].permute(1, 2, 0), alpha=alpha)
        return out

    def weighted_sum(self, p, v):
        """Σ_s p·v: p (groups, G, R·n, U), v (B, S, G, d) -> rows (groups, G, R·n, d)."""
        out = p.new_empty(*p.shape[:3], v.size(-1))
        for i in range(self.groups):
            torch.bmm(p[i], v[i, self.keys].transpose(0, 1), out=out[i])
        return out

    def scatter_add(self, p, x, out, alpha=1):
        """The adjoint: out (B, S, G, d) += α·pᵀ·x, with rows x (groups, G, R·n, d)."""
        for i in range(self.groups):
            out[i, self.keys].transpose(0, 1).baddbmm_(p[i].transpose(1, 2), x[i], alpha=alpha)


class GatheredKeys(Block):
    """
    Queries that each have keys of their own: a group is one query, n = 1.
    The products are those of sparse matrices, which gather the keys without a copy of them: the
    B·S·G rows of k.view(B·S·G, d) are one table. The operations are those of DenseBlock.
    """

    def __init__(self, queries, indices, n_keys):
        self.queries = queries
        indices = indices[:, queries]  # (B, queries, U)
        self.groups = indices.size(0) * indices.size(1)
        self.bias = (indices < 0).flatten(0, 1)[:, None].float().mul_(HIDDEN)  # (groups, 1, U)
        sequence = torch.arange(len(indices), dtype=torch.int32, device=indices.device)
        # Among all B·S keys. No key, -1, reads key 0 with weight 0 (HIDDEN)
        keys = indices.clamp(min=0) + n_keys * sequence[:, None, None]
        self.keys = keys.flatten(0, 1)  # (groups, U) int32

    def table_rows(self, G, R):
        """The row of the table for each pair of a query head and a key: (groups·H, U) int32."""
        kv_head = torch.arange(G, dtype=torch.int32, device=self.keys.device)
        kv_head = kv_head.repeat_interleave(R)  # (H,)
        return (self.keys[:, None] * G + kv_head[:, None]).flatten(0, 1)

    def add_products(self, q, k, out, alpha=1):
        columns = self.table_rows(*q.shape[1:3])  # (groups·H, U)
        q = q.flatten(0, 2)  # (groups·H, d)
        table = k.flatten(0, 2)  # (B·S·G, d)
        row_begins = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * columns.size(1)
        # A sparse matrix whose values are the memory of `out`. Its columns are in no order, which
        # check_invariants would refuse
        pairs = torch.sparse_csr_tensor(row_begins, columns.flatten(), out.flatten(),
                                        (len(q), len(table)), check_invariants=False)
        torch.sparse.sampled_addmm(pairs, q, table.T, alpha=alpha, out=pairs)
        return out

    def weighted_sum(self, p, v):
        table = v.flatten(0, 2)  # (B·S·G, d)
        out = F.embedding_bag(self.table_rows(*p.shape[1:3]), table, mode="sum",
                              per_sample_weights=p.flatten(0, 2))  # (groups·H, d)
        return out.view(*p.shape[:3], -1)

    @functools.cached_property
    def by_key(self):
        """
        The pairs of query and key, sorted by key: order (groups·U,), the place of each pair in
        self.keys; used, the keys that occur; begin, where the pairs of each of these begin.
        """
        keys, order = self.keys.flatten().sort()
        used, counts = keys.unique_consecutive(return_counts=True)
        return order, used, counts.cumsum(0) - counts

    def scatter_add(self, p, x, out, alpha=1):
        G, R = p.shape[1:3]
        order, used, begin = self.by_key
        weights = p.permute(0, 3, 1, 2).reshape(-1, G * R)  # (groups·U, H)
        weights = weights.index_select(0, order).mul_(alpha).view(-1, G, R)
        query = order // self.keys.size(1)  # (groups·U,)
        rows = (query * (G * R))[:, None] + torch.arange(R, device=order.device)  # (groups·U, R)
        for g in range(G):  # for every key, the sum over its pairs, each of which has R rows of x
            sums = F.embedding_bag((rows + g * R).flatten(), x.flatten(0, 2), begin * R,
                                   mode="sum", per_sample_weights=weights[:, g].flatten())
            out.flatten(0, 1)[:, g].index_add_(0, used, sums)


def is_gathered(selection, tile):
    """
    Do the tile's queries gather their keys? They do where the tile sees so many keys that a dense
    block of all of them would cost more.
    """
    if selection.indices is None:
        return False
    n_queries = tile.query_end - tile.query_begin
    cost = GATHERED_COST if n_queries > 1 else 1  # a lone query shares its keys with nobody
    return tile.end - tile.begin > cost * selection.indices.size(2)


def blocks(selection, n_head):
    """Yield the blocks that all queries of a selection are divided into, for n_head heads."""
    B = len(selection.k_t)
    by_kind = itertools.groupby(selection.visible.tiles, lambda tile: is_gathered(selection, tile))
    for gathered, tiles in by_kind:
        tiles = list(tiles)
        if gathered:
            step = max(1, GATHERED_LOGITS // (B * n_head * selection.indices.size(2)))
            end = tiles[-1].query_end
            for t in range(tiles[0].query_begin, end, step):
                queries = slice(t, min(t + step, end))
                yield GatheredKeys(queries, selection.indices, selection.visible.n_keys)
            continue
        for tile in tiles:
            bias = selected_bias(selection, tile).expand(B, -1, -1)  # (B, queries, end - begin)
            for t in range(tile.query_begin, tile.query_end, DENSE_QUERIES):
                t_end = min(t + DENSE_QUERIES, tile.query_end)
                # Positions strictly increase: m queries earlier, at least m keys fewer are seen
                end = tile.end - (tile.query_end - t_end)
                rows = slice(t - tile.query_begin, t_end - tile.query_begin)
                part = bias[:, rows, :end - tile.begin]  # (B, n, U)
                yield DenseBlock(slice(t, t_end), slice(tile.begin, end), part)


# --------------------------------------------------------------------------------------------------
# Attention and the index loss, block by block

class SparseAttention(torch.autograd.Function):
    """attention.sparse_attention. Returns o (B, T, H, d) and LSE (B, T, H)."""

    @staticmethod
    def forward(ctx, q, k, v, selection):
        dtype = q.dtype
        q, k, v = (at_least_fp32(x).contiguous() for x in (q, k, v))
        o = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3])
        workspace = Workspace()
        for block in blocks(selection, q.size(2)):
            s = block.logits(block.rows(q, k.size(2)), k, workspace)  # (groups, G, R·n, U)
            largest = s.amax(-1)
            p = torch.softmax(s, -1, out=s)  # in place
            block.store(block.weighted_sum(p, v), o)
            # The largest P is 1 / Σ exp(s - largest s)
            block.store((largest - p.amax(-1).log())[..., None], lse[..., None])
        ctx.save_for_backward(q, k, v, o)
        ctx.selection = selection
        ctx.mark_non_differentiable(lse)
        return o.to(dtype), lse

    @staticmethod
    def backward(ctx, do, _):
        """
        P is computed again: nothing of size T·k was kept.
        dP = dO·v, dS = P·(dP - Σ_d dO·O), dq = dS·k/√d, dk = dSᵀ·q/√d, dv = Pᵀ·dO.
        """
        q, k, v, o = ctx.saved_tensors
        do = do.to(q.dtype).contiguous()
        G = k.size(2)
        scale = 1 / math.sqrt(k.size(3))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        workspace = Workspace()
        for block in blocks(ctx.selection, q.size(2)):
            q_rows, o_rows, do_rows = (block.rows(x, G) for x in (q, o, do))
            s = block.logits(q_rows, k, workspace)  # (groups, G, R·n, U)
            p = torch.softmax(s, -1, out=s)
            ds = workspace("ds", p, *p.shape)
            ds.copy_((do_rows * o_rows).sum(-1, keepdim=True).neg_())  # -Σ_d dO·O
            block.add_products(do_rows, v, ds).mul_(p)
            block.store(block.weighted_sum(ds, k).mul_(scale), dq)
            block.scatter_add(ds, q_rows, dk, scale)
            block.scatter_add(p, do_rows, dv)
        return dq, dk, dv, None


sparse_attention = torch.compiler.disable(SparseAttention.apply)


class IndexLoss(torch.autograd.Function):
    """
    attention.index_loss. The loss is a number, so its gradients are computed in the same pass over
    the blocks, and backward only scales them. want_grads = False leaves them out.
    """

    @staticmethod
    def forward(ctx, iq, ik, iw, ib, log_tau, activation, q, k, selection, want_grads):
        iq, ik, iw, ib = (at_least_fp32(x).contiguous() for x in (iq, ik, iw, ib))
        q, k = (at_least_fp32(x).contiguous() for x in (q, k))
        scale = 1 / math.sqrt(iq.size(3))
        tau = at_least_fp32(log_tau).exp()
        ik = ik[:, :, None]  # (B, S, 1, di): one key head
        iw = iw[..., None]  # (B, T, Hi, 1)
        diq, dik, diw, dib = map(torch.zeros_like, (iq, ik, iw, ib))
        loss, dlog_tau = torch.zeros_like(tau), torch.zeros_like(tau)
        workspace = Workspace()
        for block in blocks(selection, q.size(2)):
            # 1. teacher: the attention, averaged over the heads
            s = block.logits(block.rows(q, k.size(2)), k, workspace)  # (groups, G, R·n, U)
            n, U = block.bias.shape[1:]
            per_head = (block.groups, -1, n, U)  # the shape (groups, H or Hi, n, U)
            p = torch.softmax(s, -1, out=s)
            p = p.view(per_head).mean(1).to(iq.dtype)  # (groups, n, U)
            # 2. student: softmax(τ·I), and log Z, the LSE of τ·I
            q_rows = block.rows(iq, 1)  # (groups, 1, Hi·n, di)
            w_rows = block.rows(iw, 1)  # (groups, 1, Hi·n, 1)
            z = workspace("z", iq, *q_rows.shape[:3], U)
            z.view(per_head).copy_(ib[:, None, None])
            block.add_products(q_rows, ik, z, scale)
            a = z.sigmoid_() if activation == "sigmoid" else z.relu_()
            scores = (a * w_rows).view(per_head).sum(1)  # (groups, n, U), Eq. 7
            logits = block.bias + scores * tau
            student = logits.softmax(-1)
            log_z = logits.amax(-1) - student.amax(-1).log()  # (groups, n)
            # 3. Σ_s p·(log p - τ·I + log Z), where Σ_s p = 1
            loss += torch.xlogy(p, p).sum() - tau * (p * scores).sum() + log_z.sum()
            if not want_grads:
                continue
            # 4. gradients; that of τ·I is student - p
            g = student.sub_(p)
            dlog_tau += (g * scores).sum() * tau
            g *= tau
            dw = (a.view(per_head) * g[:, None]).sum(-1)  # (groups, Hi, n)
            block.store(dw.view(block.groups, 1, -1, 1), diw)
            dz = a - a.square() if activation == "sigmoid" else (a > 0).to(a.dtype)
            dz.view(per_head).mul_(g[:, None])
            dz *= w_rows  # (groups, 1, Hi·n, U)
            dib += dz.view(per_head).sum((0, 2, 3))
            block.store(block.weighted_sum(dz, ik).mul_(scale), diq)
            block.scatter_add(dz, q_rows, dik, scale)
        ctx.save_for_backward(diq, dik[:, :, 0], diw[..., 0], dib, dlog_tau)
        ctx.n_queries = iq.size(0) * iq.size(1)
        return loss / ctx.n_queries

    @staticmethod
    def backward(ctx, grad):
        grads = [g * (grad / ctx.n_queries) for g in ctx.saved_tensors]
        return *grads, None, None, None, None, None


index_loss = torch.compiler.disable(IndexLoss.apply)
