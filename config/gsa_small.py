"""
GPT-2-small size (127M parameters) at 4096 tokens, 10B tokens:
    torchrun --nproc_per_node=8 train.py config/gsa_small.py
The other arms: --attention=dense --out_dir=out/dense, likewise gated and sparse.
Hardware: one node of 8 × H100.
Duration: not measured yet. Estimated 0.7 hours, from flops_per_token at an assumed 40 % MFU.
Expected loss: not measured yet.
"""
data = "data/slimpajama"
out_dir = "out/gsa_small"
attention = "gsa"
n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
block_size = 4096
rope_base = 50000.0
k_base = 512
k_min = 128
k_max = 1024
batch_size = 8
grad_accum = 16  # 8 × 16 × 4096 = 0.5M tokens per step
max_iters = 19000  # 10B tokens
index_warmup_iters = 1000
warmup_iters = 700
learning_rate = 6e-4
min_lr = 6e-5
eval_interval = 500
compile = True
