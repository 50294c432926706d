"""Pipeline stages: every stage runs the model's own forward, in which modules of other stages are holes.

holes.py          what stands in the forward of a module that is elsewhere
micro_batches.py  a call cut into several, and what each one's loss counts
schedule.py       in which order a stage runs forwards and backwards
messages.py       hidden states to the next stage, their gradients to the one before
executor.py       one stage's forwards and backwards on shadows of its parameters
compiled.py       its layers, where a script compiles the model
router_loss.py    the auxiliary loss of a mixture's routers
forward.py        the forward that a script calls
stage_reads.py    how a stage's ranks agree on their logits
hand_out.py       gradients that are there already, given to autograd
"""
