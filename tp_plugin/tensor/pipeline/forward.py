"""The forward of a model that is cut into stages: the script calls it, and nothing else of the pipeline.

With labels and gradients, the backward of each micro-batch runs between the forwards (1F1B), from a loss gradient of 1,
and the loss that is returned hands the gradients out when the script calls its backward. Without labels, or where the
loss is to be the script's own, all forwards run first (GPipe), and all backwards in the script's.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from tp_plugin.errors import TPError
from tp_plugin.tensor.graphs import Compiler, disable, skip
from tp_plugin.tensor.pipeline.compiled import CompiledLayers
from tp_plugin.tensor.pipeline.executor import Executor, Passed
from tp_plugin.tensor.pipeline.gathered import Gathered
from tp_plugin.tensor.pipeline.hand_out import Computed, Gradients, Late
from tp_plugin.tensor.pipeline.micro_batches import MicroBatches, arguments, counted, cut
from tp_plugin.tensor.pipeline.router_loss import RouterLoss, Sums, loss_of
from tp_plugin.tensor.pipeline.schedule import one_f_one_b
from tp_plugin.tensor.rng import Dropouts

SCORES = "fused_lm_head"
"""TRL's argument for log-probabilities in place of logits, beside a loss: the script may use either."""


class Outputs(Protocol):
    """Gives a row-wise output of the last stage to all stages."""

    def __call__(self, name: str, fake: torch.Tensor, made: list[torch.Tensor], loss: torch.Tensor | None) -> Any:
        """The whole output ``name``, maybe read only when it is used.

        Args:
            fake: of the same shape, dtype and device.
            made: what the last stage has of each micro-batch; nothing elsewhere.
            loss: that for which its backward has run.
        """


class PipelineForward:
    """Stands in ``model.forward``.

    Args:
        model: the model, with holes in place of what is on other stages.
        inner: its forward as it was.
        executor: runs micro-batches.
        micro_batches: into how many a batch is cut.
        always_late: whether backwards run in the script's, even where the model computes its own loss.
        outputs: gives logits to all stages.
        own: layers that are here.
        absent: layers that are elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: Callable[..., Any],
        executor: Executor,
        micro_batches: int,
        always_late: bool,
        outputs: Outputs,
        own: Sequence[nn.Module],
        absent: Sequence[nn.Module],
    ):
        self._model, self._inner, self._executor, self._outputs = model, inner, executor, outputs
        self._micro_batches, self._always_late, self._absent = micro_batches, always_late, list(absent)
        self._compiled = CompiledLayers(own)
        self._messages = executor.messages
        self._used: dict[str, bool] = {}
        self._dropouts = Dropouts()
        self._gathered = Gathered(model)
        self._routers = RouterLoss.of(model)
        self._is_split = False
        self.__signature__ = inspect.signature(inner)  # generate and Trainer look at it

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TPError(
            "a model that is cut into pipeline stages cannot be copied; copy it before accelerator.prepare, or write "
            "pp_size: 1"
        )

    @skip
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._compiled.present(), args, kwargs)

    @disable
    def _run(self, compiler: Compiler, args: Any, kwargs: Any) -> Any:
        call = arguments(self.__signature__, args, kwargs)
        routes = self._refuse(call)
        asked = call.pop("return_dict", None)
        as_tuple = not (getattr(getattr(self._model, "config", None), "return_dict", True) if asked is None else asked)
        if self._takes("return_dict"):
            call["return_dict"] = True
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self._model.parameters())
        if learns:
            self._refuse_learned(call)
        batches = self._cut(call, learns)
        for layer in self._absent:
            if getattr(layer, "gradient_checkpointing", False):  # nothing to compute again, and messages are sent once
                layer.gradient_checkpointing = False  # type: ignore[assignment]
        draws = self._model.training and self._dropouts(self._model)
        executor = self._executor
        with (
            self._gathered.whole(learns) as self._is_split,
            executor.running(),
            executor.seeds.around(batches.device, draws) as seed,
            self._compiled.by(compiler),
        ):
            late = self._always_late or routes or call.get(SCORES) or self._underflows(batches.device)
            if not learns:
                output = self._evaluate(batches)
            elif batches.has_labels and not late:
                output = self._one_f_one_b(batches)
            else:
                output = self._late(batches, seed, compiler)
        return output.to_tuple() if as_tuple else output

    def _refuse(self, call: dict[str, Any]) -> bool:
        """Gives whether an auxiliary loss of routers is asked for."""
        config, routes = getattr(self._model, "config", None), False
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            asked = call.get(name)
            if asked or (asked is None and getattr(config, name, False)):
                if name == "output_router_logits" and self._routers is not None:
                    routes = True
                    continue
                raise TPError(
                    f"{name} is on, and layers of other pipeline stages give theirs there; turn it off, or write "
                    "pp_size: 1"
                )
        return routes

    def _refuse_learned(self, call: dict[str, Any]) -> None:
        for name, value in call.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise TPError(
                    f"{name!r} requires a gradient, which pipeline stages do not give back to what has computed it; "
                    "pass it with .detach(), or write pp_size: 1"
                )

    def _underflows(self, device: torch.device) -> bool:
        """Whether activations are fp16: their gradients need the scaler's factor, which the script's backward has."""
        kind = device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return autocast or any(p.dtype == torch.float16 for p in self._model.parameters())

    def _cut(self, call: dict[str, Any], learns: bool) -> MicroBatches:
        cached = call.get("past_key_values") is not None or bool(call.get("use_cache"))
        if not cached and call.get("use_cache") is None and self._takes("use_cache"):
            call["use_cache"] = False  # nobody asked for the cache of a batch, which would hold all stages' activations
        batches = cut(self._model, self._inner, call, 1 if cached else self._micro_batches)
        if not self._messages.is_last:
            for part in batches.calls:
                if not part.get(SCORES):  # whose output has the labels' shape on every stage
                    part.pop("labels", None)
        return batches

    def _takes(self, name: str) -> bool:
        parameters = self.__signature__.parameters
        return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def _summing(self) -> contextlib.AbstractContextManager[list[Sums]]:
        return contextlib.nullcontext([]) if self._routers is None else self._routers.summing()

    def _evaluate(self, batches: MicroBatches) -> Any:
        with self._summing() as of_routers:
            passed = [self._executor.forward(at, call, False) for at, call in enumerate(batches.calls)]
        self._messages.finish()
        loss = self._total(passed, batches) if batches.has_labels else None
        auxiliary, _ = self._auxiliary(of_routers)
        for one in passed:
            one.output = one.output if auxiliary is None else _without_routers(one.output)
        output = self._output([one.output for one in passed], batches, loss, spent=False)
        return output if auxiliary is None else self._with_auxiliary(output, auxiliary)

    def _auxiliary(self, of_routers: list[Sums]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The auxiliary loss of the whole batch and all layers, and its gradient by the routers' probabilities."""
        if not of_routers:
            return None, None
        mine = [
            torch.stack(each).sum(0)
            for each in zip(*((one.chosen, one.probabilities.detach()) for one in of_routers), strict=True)
        ]
        total = self._messages.sum_of_stages(torch.cat(mine))
        return loss_of(*total.split([len(each) for each in mine]))

    def _with_auxiliary(self, output: Any, auxiliary: torch.Tensor) -> Any:
        """``output`` as the model would have made it of the whole batch."""
        assert self._routers is not None
        fields = dict(output.items())
        if "loss" in fields:
            fields["loss"] = fields["loss"] + self._routers.coefficient * auxiliary
        return type(output)(**fields, aux_loss=auxiliary)

    def _one_f_one_b(self, batches: MicroBatches) -> Any:
        """1F1B, from a unit gradient of the loss."""
        executor, messages = self._executor, self._messages
        alive: dict[int, Passed] = {}
        outputs: list[Any] = []
        total: torch.Tensor | None = None
        with executor.shadows() as shadows:
            for kind, at in one_f_one_b(messages.stage, messages.stages, len(batches.calls)):
                if kind == "forward":
                    passed = alive[at] = executor.forward(at, batches.calls[at], True)
                    if messages.is_last:
                        passed.loss = counted(passed.output.loss, batches.shares[at])
                        total = passed.loss.detach().float() if total is None else total + passed.loss.detach().float()
                    outputs.append(_detached(passed.output))
                    passed.output = None
                else:
                    passed = alive.pop(at)
                    roots = [passed.loss] if passed.loss is not None else []
                    executor.backward(at, passed, roots, [torch.ones_like(root) for root in roots])
        messages.finish()
        loss = messages.from_last(torch.zeros((), device=batches.device) if total is None else total)
        gradients, parameters = self._gradients(shadows)
        loss = Computed.apply(gradients, self._gathered.gather, loss, *parameters)
        return self._output(outputs, batches, loss, spent=True)

    def _late(self, batches: MicroBatches, seed: Any, compiler: Compiler) -> Any:
        """All forwards; the backwards run when autograd comes to the outputs."""
        executor, messages = self._executor, self._messages
        with executor.shadows() as shadows, self._summing() as of_routers:
            passed = [executor.forward(at, call, True) for at, call in enumerate(batches.calls)]
        messages.finish()
        auxiliary, slope = self._auxiliary(of_routers)
        for one in passed:
            one.output = one.output if auxiliary is None else _without_routers(one.output)
        first = passed[0].output
        names = [name for name, value in first.items() if name != "loss" and _is_rows(value, batches.rows[0])]
        made = [[_plain(one.output[name]) for name in names] for one in passed]
        sent = [_joined([parts[at].detach() for parts in made]) for at in range(len(names))]
        sent = [messages.from_last(one.contiguous().clone()) for one in sent]
        floats = [at for at, one in enumerate(sent) if one.is_floating_point()]
        loss = self._total(passed, batches) if batches.has_labels else None
        own = [one.output.loss if batches.has_labels and messages.is_last else None for one in passed]
        kind, rest = type(first), {name: v for name, v in first.items() if name not in (*names, "loss")}
        for one in passed:
            one.output = None
        alive = list(zip(passed, made, own, strict=True))
        del passed, made, own

        def backward(grads: Sequence[torch.Tensor | None]) -> Gradients:
            of_loss = grads[0] if loss is not None else None
            of_rows: list[Any] = [None] * len(sent)
            *of_auxiliary, scale = grads if auxiliary is not None else (*grads, None)
            for at, grad in zip(floats, of_auxiliary[loss is not None :], strict=True):
                of_rows[at] = None if grad is None else grad.split(batches.rows)
            self._gathered.gather()
            with (
                self._gathered.passing(),
                executor.running(),
                executor.with_shadows(shadows),
                executor.seeds.again(seed),
                self._compiled.by(compiler),
                torch.enable_grad(),
            ):
                for at in range(len(batches.rows)):
                    one, outputs, own_loss = alive.pop(0)
                    pairs = [
                        (root, parts[at]) for root, parts in zip(outputs, of_rows, strict=True) if parts is not None
                    ]
                    if own_loss is not None and of_loss is not None:
                        pairs.append((own_loss, (of_loss * batches.shares[at]).to(own_loss.dtype)))
                    beside = []
                    if scale is not None and slope is not None:
                        beside = [(of_routers.pop(0).probabilities, scale * slope)]
                    executor.backward(at, one, [root for root, _ in pairs], [grad for _, grad in pairs], beside)
            messages.finish()
            return self._gradients(shadows)[0]

        parameters = [p for p in self._model.parameters() if p.requires_grad]
        given = [*([] if loss is None else [loss]), *(sent[at] for at in floats)]
        given += [] if auxiliary is None else [auxiliary]
        outputs = list(Late.apply(backward, len(given), *given, *parameters))
        fields = {} if loss is None else {"loss": outputs.pop(0)}
        auxiliary = None if auxiliary is None else outputs.pop()
        found = dict(zip(names, sent, strict=True)) | {names[at]: one for at, one in zip(floats, outputs, strict=True)}
        output = kind(**fields, **found, **rest)
        return output if auxiliary is None else self._with_auxiliary(output, auxiliary)

    def _gradients(self, shadows: dict[str, torch.Tensor]) -> tuple[Gradients, list[torch.Tensor]]:
        """Of all trained parameters, those that this stage does not hold included: they have no elements.

        DDP waits for a gradient of each; an optimizer's kernels take no such parameter beside FSDP2's.
        """
        named = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if self._used.keys() != named.keys():
            self._used = self._in_use(named, shadows)
        empty = {name: torch.zeros_like(p) for name, p in named.items() if self._used[name] and not self._is_split}
        found: Gradients = [shadows[name].grad if name in shadows else empty.get(name) for name in named]
        return found, list(named.values())

    def _in_use(self, named: dict[str, Any], shadows: dict[str, torch.Tensor]) -> dict[str, bool]:
        """Which parameters got a gradient where they are; asked at the first backward, the host waits for it."""
        mine = [name in shadows and shadows[name].grad is not None for name in named]
        device = next(iter(named.values())).device
        return dict(zip(named, self._messages.anywhere(mine, device), strict=True))

    def _total(self, passed: list[Passed], batches: MicroBatches) -> torch.Tensor:
        total = torch.zeros((), device=batches.device)
        if self._messages.is_last:
            for one, share in zip(passed, batches.shares, strict=True):
                total = total + counted(one.output.loss.detach().float(), share)
        return self._messages.from_last(total)

    def _output(self, outputs: list[Any], batches: MicroBatches, loss: torch.Tensor | None, spent: bool) -> Any:
        """The model's output, of those of the micro-batches."""
        first, fields = outputs[0], {}
        for name, value in first.items():
            if name == "loss":
                continue
            if _is_rows(value, batches.rows[0]):
                fake = torch.empty((), dtype=value.dtype, device=value.device)
                made = [output[name] for output in outputs] if self._messages.is_last else []
                fake = fake.expand(sum(batches.rows), *value.shape[1:])
                fields[name] = self._outputs(name, fake, made, loss if spent else None)
            elif isinstance(value, torch.Tensor):
                raise TPError(
                    f"pipeline stages: the output {name!r} of shape {tuple(value.shape)} is not of one row each; turn "
                    "it off, or write pp_size: 1"
                )
            else:
                fields[name] = value
        return type(first)(**({} if loss is None else {"loss": loss}), **fields)


def _without_routers(output: Any) -> Any:
    """A part's output, less what is of its own layers and rows only."""
    return type(output)(**{name: v for name, v in output.items() if name not in ("router_logits", "aux_loss")})


def _is_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows


def _detached(output: Any) -> Any:
    fields = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in output.items() if name != "loss"}
    return type(output)(**fields)


def _plain(output: Any) -> torch.Tensor:
    return output.plain() if hasattr(output, "vocabulary") else output  # type: ignore[no-any-return]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
