"""Sprig, a made-up architecture: what the docs' "Add an architecture" starts from."""

from transformers import AutoConfig, AutoModelForCausalLM

from sprig.modeling import SprigConfig, SprigForCausalLM

AutoConfig.register("sprig", SprigConfig)
AutoModelForCausalLM.register(SprigConfig, SprigForCausalLM)
