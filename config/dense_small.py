"""The dense arm of gsa_small.py: GPT-2-small size at 4096 tokens: torchrun --nproc_per_node=8 train.py config/dense_small.py"""
data = "data/slimpajama"
out_dir = "out/dense_small"
attention = "dense"
n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
block_size = 4096
rope_base = 50000.0
batch_size = 8
grad_accum = 16  # 8 × 16 × 4096 = 0.5M tokens per step
max_iters = 19000  # 10B tokens
warmup_iters = 700
learning_rate = 6e-4
min_lr = 6e-5
eval_interval = 500
compile = True
