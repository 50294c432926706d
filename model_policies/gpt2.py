"""GPT-2: Conv1D weights (in, out), fused ``[q|k|v]``, tied ``wte``/``lm_head``; optional cross-attention."""

from tp_plugin.policy import MLP, Attention, Blocks, Policy, Vocabulary, even, q

LOCAL = {"num_heads": "q_heads", "split_size": "q_width"}

GPT2 = Policy(
    model_types=("gpt2",),
    blocks=(
        Attention("h.*.attn", columns={"c_attn": Blocks(("q", "k", "v"))}, row={"c_proj": q}, local_sizes=LOCAL),
        Attention(
            "h.*.crossattention",
            columns={"q_attn": q, "c_attn": Blocks(("k", "v"))},
            row={"c_proj": q},
            inputs=("hidden_states", "encoder_hidden_states"),
            local_sizes=LOCAL,
            optional=True,
        ),
        MLP("h.*.mlp", columns={"c_fc": even}, row={"c_proj": even}, inputs=("hidden_states",)),
    ),
    vocabulary=Vocabulary(embedding="wte", head="lm_head"),
    replicated=(
        *("wpe", "h.*.ln_1", "h.*.ln_2", "h.*.ln_cross_attn", "ln_f"),
        *("score", "classifier", "qa_outputs", "multiple_choice_head"),
    ),
)

POLICIES = (GPT2,)
