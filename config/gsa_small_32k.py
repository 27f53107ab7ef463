"""
GPT-2-small size (127M parameters) at 32768 tokens, 0.5B tokens, from the weights of gsa_small:
    torchrun --nproc_per_node=8 train.py config/gsa_small_32k.py
YaRN stretches the positions of the 4096 tokens that those were trained with. The indexer is trained
already, so there is no warm-up. A run that was interrupted goes on by the same command. Most
documents are short: attention crosses their boundaries here, or no query would see far. Better data
are long documents, with doc_mask: prepare.py --min_chars=100000
Hardware: one node of 8 × H100.
Duration: not measured yet. Estimated 3 minutes, from flops_per_token at an assumed 40 % MFU.
Expected loss: not measured yet.
"""
data = "data/slimpajama"
out_dir = "out/gsa_small_32k"
init_from = "auto:out/gsa_small"
attention = "gsa"
n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
block_size = 32768
rope_base = 50000.0
rope_scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
k_base = 512
k_min = 128
k_max = 1024
doc_mask = False
batch_size = 1
grad_accum = 16  # 16 × 32768 = 0.5M tokens per step
max_iters = 1000  # 0.5B tokens
index_warmup_iters = 0
warmup_iters = 50
learning_rate = 1e-4
min_lr = 1e-5
eval_interval = 100
compile = True
