"""Whisper: BART's layers behind a convolutional front end, which every rank holds whole as it does the positions."""

from model_policies.encoder_decoder import BART_BLOCKS, BART_REPLICATED
from tp_plugin.policy import Policy, Vocabulary

POLICIES = (
    Policy(
        ("whisper",),
        BART_BLOCKS,
        Vocabulary("embed_tokens", "proj_out"),
        (*BART_REPLICATED, "encoder.conv1", "encoder.conv2", "projector", "classifier", "layer_weights"),
    ),
)
