"""Llama and the decoders whose modules have the same names and mean the same (each proven in tests/test_zoo.py)."""

from tp_plugin.policy import MLP, Attention, Policy, Vocabulary, even

GROUPS = {"num_key_value_groups": "groups"}
ATTENTION = Attention("layers.*.self_attn", local_sizes=GROUPS)
# q and k are normalised per head, with one weight of head_dim shared by all heads
NORMED_ATTENTION = Attention("layers.*.self_attn", partial=("q_norm", "k_norm"), local_sizes=GROUPS)
GATED_MLP = MLP("layers.*.mlp")
PLAIN_MLP = MLP("layers.*.mlp", columns={"up_proj": even}, row={"down_proj": even})
STARCODER_MLP = MLP("layers.*.mlp", columns={"c_fc": even}, row={"c_proj": even}, inputs=("hidden_states",))

NORMS = ("layers.*.input_layernorm", "layers.*.post_attention_layernorm", "norm")
SANDWICH_NORMS = (*NORMS, "layers.*.pre_feedforward_layernorm", "layers.*.post_feedforward_layernorm")
TASK_HEADS = ("score", "qa_outputs")

POLICIES = (
    Policy(
        ("llama", "mistral", "ministral", "qwen2", "gemma", "granite", "smollm3", "olmo", "helium", "seed_oss"),
        (ATTENTION, GATED_MLP),
        Vocabulary(),
        (*NORMS, *TASK_HEADS),
    ),
    Policy(("gemma2",), (ATTENTION, GATED_MLP), Vocabulary(), (*SANDWICH_NORMS, "score")),
    Policy(("gemma3_text",), (NORMED_ATTENTION, GATED_MLP), Vocabulary(), (*SANDWICH_NORMS, "score")),
    Policy(("qwen3",), (NORMED_ATTENTION, GATED_MLP), Vocabulary(), (*NORMS, *TASK_HEADS)),
    Policy(("arcee",), (ATTENTION, PLAIN_MLP), Vocabulary(), (*NORMS, *TASK_HEADS)),
    Policy(("starcoder2",), (ATTENTION, STARCODER_MLP), Vocabulary(), (*NORMS, "score")),
)
