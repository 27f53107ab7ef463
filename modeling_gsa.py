"""
The model as the package transformers wants it. `python model.py --export` (export.py) puts this
file and those that it imports beside the weights; nothing else here uses it.

    model = AutoModelForCausalLM.from_pretrained("hf_out", trust_remote_code=True)
    model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=100)

Written for transformers 5.24.
"""
import re
from dataclasses import replace

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model import GSA, GSAConfig, KVCache


class GSAModelConfig(PretrainedConfig):
    """
    config.json. gsa: the fields of model.GSAConfig. separator: the token that begins a document,
    whatever ends a generated text (eos_token_id). doc_mask: attention stops there. backend: see
    attention.py. The others are for transformers itself.
    """
    model_type = "gsa"

    def __init__(self, gsa=None, separator=0, doc_mask=True, backend="auto", **others):
        super().__init__(**others)
        self.gsa = gsa or {}
        self.separator = separator
        self.doc_mask = doc_mask
        self.backend = backend


class GrowingCache(KVCache):
    """A KVCache that becomes larger as it fills, and that beam search can reorder."""

    def __init__(self, B, limit, device):
        super().__init__(B, 0, device)
        self.limit = limit  # largest size
        self.n_read = 0  # columns of input_ids that have been read, padding included
        self.doc_start = self.length[:, None]  # (B, 1), start of the document that goes on

    def reserve(self, size):
        """Make room for rows of so many tokens."""
        if min(size, self.limit) <= self.size:
            return
        self.size = min(max(size, 2 * self.size), self.limit)
        for key, x in self.buffers.items():
            larger = x.new_zeros(len(x), self.size, *x.shape[2:])
            larger[:, :x.size(1)] = x
            self.buffers[key] = larger

    def reorder_cache(self, rows):
        """Row i becomes a copy of row rows[i]."""
        self.buffers = {key: x[rows] for key, x in self.buffers.items()}
        self.length = self.length[rows]
        self.doc_start = self.doc_start[rows]


class GSAForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = GSAModelConfig
    base_model_prefix = "model"
    _is_stateful = True  # transformers: no assisted generation, for it cuts a cache back

    def __init__(self, config):
        super().__init__(config)
        self.model = GSA(GSAConfig(**config.gsa), config.backend)
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self):
        """
        Compute the buffers that no file holds, RoPE's tables for example: from_pretrained builds
        the model without memory ("meta"), loads the weights, and then calls this.
        """
        with torch.device("cpu"):
            one_layer = GSA(replace(self.model.config, n_layer=1, vocab_size=1))
        known, saved = dict(one_layer.named_buffers()), self.model.state_dict()
        for name, buffer in self.model.named_buffers():
            if name not in saved:
                buffer.copy_(known[re.sub(r"blocks\.\d+", "blocks.0", name)])

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # generate() leaves the cache to forward

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, cache=None,
                                      past_key_values=None, use_cache=True, **others):
        cache = past_key_values if cache is None else cache
        if cache is not None:
            input_ids = input_ids[:, cache.n_read:]
        elif attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("generate() continues the last column: pad prompts on the left")
        return dict(input_ids=input_ids, attention_mask=attention_mask, cache=cache,
                    use_cache=use_cache, logits_to_keep=1)

    def forward(self, input_ids, attention_mask=None, cache=None, past_key_values=None,
                labels=None, use_cache=False, logits_to_keep=0, return_dict=True):
        """
        input_ids (B, T), the tokens behind those of the cache -> logits (B, T, vocab_size).
        attention_mask  (B, at least T), the last T columns count; 0 = padding, on either side: the
                        other tokens get the logits that they get without it
        cache           what an earlier call with use_cache returned
        labels          (B, T), usually input_ids, -100 = ignored; loss: mean, nats per token
        logits_to_keep  compute the logits of so many last columns only; 0 = of all
        """
        cache = past_key_values if cache is None else cache
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions, not 2")
        if use_cache and cache is None:
            limit = self.model.config.block_size
            cache = GrowingCache(len(input_ids), limit, input_ids.device)
        # 1. padding goes to the end of its row, where no token sees it
        is_text = attention_mask[:, -input_ids.size(1):] != 0  # (B, T)
        order = is_text.int().argsort(dim=1, descending=True, stable=True)  # (B, T)
        idx = input_ids.gather(1, order)  # (B, T)
        # 2. the model
        x = self.trunk(idx, is_text.gather(1, order), cache)  # (B, T, C)
        # 3. back to the order of input_ids
        place = order.argsort(dim=1)  # (B, T)
        if logits_to_keep:
            place = place[:, -logits_to_keep:]  # (B, T')
        x = x.gather(1, place[..., None].expand(-1, -1, x.size(2)))  # (B, T', C)
        logits = self.model.head(x)  # (B, T', vocab_size)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        return output if return_dict else output.to_tuple()

    def trunk(self, idx, is_text, cache):
        """GSA.trunk of rows idx (B, T) that end with padding, where is_text (B, T) is False."""
        pos = torch.arange(idx.size(1), device=idx.device)
        last_start = 0
        if cache is not None:
            pos = cache.length[:, None] + pos  # (B, T)
            last_start = cache.doc_start  # (B, 1)
            cache.n_read += idx.size(1)
            cache.reserve(cache.n_read)
        doc_start = None
        if self.config.doc_mask:
            begins = is_text & (idx == self.config.separator)  # (B, T)
            doc_start = torch.where(begins, pos, last_start).cummax(1).values  # (B, T)
        x = self.model.trunk(idx, doc_start, cache)[0]  # (B, T, C)
        if cache is not None:
            cache.length = cache.length - (~is_text).sum(1)  # padding gets overwritten
            if doc_start is not None:
                cache.doc_start = doc_start[:, -1:]
        return x
