"""LLaVA and its kin: a language model and a vision tower, each by the policy of its own type, and a whole projector."""

from tp_plugin.policy import Policy, Vocabulary

POLICIES = (
    Policy(
        ("llava", "paligemma", "gemma3"),
        vocabulary=Vocabulary((), "lm_head"),  # tied or not: the embedding is the language model's
        replicated=("multi_modal_projector", "score"),
        towers={"language_model": "text_config", "vision_tower": "vision_config"},
    ),
)
