"""Training on several processes, with the parameters that one process would have come to.

Every process holds the whole (global) batch and the same seeds; what is divided is the networks' work. Inside
`Group.dividing` a network takes its rows of what it is given, runs, and gathers what all processes made. So losses,
quantiles, ranks, thresholds, memories, moving averages, draws and optimisers see the whole batch on every process, as
if there were one, whatever the method. Four operations do it; each is linear, differentiable any number of times, and
has another one for its derivative:

    rows    a replicated tensor -> this process's rows          backward: gather
    gather  rows -> the replicated tensor                       backward: rows
    enter   a replicated tensor -> the same, for divided work   backward: total
    total   partial sums -> their sum, replicated               backward: enter

A network's parameters enter, all of them in one node, so that their gradients are summed in one message and are those
of the whole batch on every process: nothing else has to be reduced, in meta-gradients and double backward neither.

Which networks: the method's own modules, and those in its lists, that hold a convolution, by their `forward` and by
the functions that a class names in `rowwise`, which treat each row (image) for itself. Batch norm in them takes the
statistics of the whole batch, dropout draws the whole batch's mask. Everything else, such as the small nets that
weigh pixels, is computed by every process alike; so is a network with a module in `UNDIVIDED`.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from ..dual_norms import DualNorm
from ..meta import replicated
from .signals import Interrupted

if TYPE_CHECKING:
    from lightning.fabric import Fabric

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # that one process waits for another: data are read, cases predicted in between
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Draw from the random generator, or mix rows, in ways that are not known here.
UNDIVIDED = (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU, nn.RNNBase)


# Its newer name, and the older one.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# ---- starting -------------------------------------------------------------------------------------


def launch(device: torch.device, devices: int, nodes: int, precision: Any) -> tuple[Fabric, Group]:
    """Fabric, and the processes that train together: those of torchrun or Slurm where one of them has started this
    process, else `devices` of them on each of `nodes` computers, the others of which Fabric starts here by this
    process's own command line.

    Raises ValueError where the devices are not there.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    if {
        "RANK",
        "GROUP_RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
    } <= os.environ.keys():  # torchrun, as Fabric tells it
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    if devices * nodes == 1:
        one: Any = 1 if device.type == "cpu" else [device.index]
        return Fabric(accelerator=device.type, devices=one, precision=precision), Group(1, 0)
    if device.type == "cuda" and (device.index or devices > torch.cuda.device_count()):
        raise ValueError(
            f"devices {devices}: needs as many GPUs, the first ones; torch {torch.__version__} sees "
            f"{torch.cuda.device_count()}, device is {device}"
        )

    class Together(DDPStrategy):
        def setup_module(self, module: nn.Module) -> Any:
            return module  # `enter` reduces gradients

    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"  # flags need not wait for the GPU
    strategy: Any = Together(process_group_backend=backend, timeout=TIMEOUT)
    fabric = Fabric(
        accelerator=device.type, devices=devices, num_nodes=nodes, strategy=strategy, precision=precision
    )
    fabric.launch()
    return fabric, Group(fabric.world_size, fabric.global_rank)


def place() -> int:
    """This process's rank; before the processes have found each other, 0 for the first, another number for others."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return max(int(os.environ.get(name, 0)) for name in ("RANK", "NODE_RANK", "LOCAL_RANK"))


def silent(error: BaseException) -> bool:
    """Whether another process says this error: it is raised on all, and this is not the first."""
    alone = dist.is_available() and dist.is_initialized() and not getattr(error, "everywhere", False)
    return place() > 0 and (not alone or isinstance(error, KeyboardInterrupt))


@contextmanager
def told(out: str) -> Iterator[None]:
    """Inside, ConnectionError in plain words where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not any(f"Connection {what} by peer" in str(error) for what in ("closed", "reset")):
            raise
        raise ConnectionError(
            "another of the processes that train together has ended, as it or the system's log says; "
            f"noisyseg train --resume {out} goes on from the last checkpoint"
        ) from error


# ---- the four operations --------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """Rows of each of the tensors, `sizes[i]` of them on process i -> all of them, in one message."""

    @staticmethod
    def forward(ctx: Any, group: Group, sizes: Any, what: str, *parts: Tensor) -> Any:
        ctx.group, ctx.sizes, ctx.what = group, sizes, what
        ctx.set_materialize_grads(False)
        return tuple(group.gather_raw(what, [(p, sizes) for p in parts]))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, None, *_some(partial(_Rows.apply, ctx.group, ctx.sizes, ctx.what), grads)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, ___: Any, *dots: Any) -> Any:
        return _some(partial(_Gather.apply, ctx.group, ctx.sizes, ctx.what), dots)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, sizes: Any, what: str, *wholes: Tensor) -> Any:
        ctx.group, ctx.sizes, ctx.what = group, sizes, what
        ctx.set_materialize_grads(False)
        return tuple(group.own(x, sizes).clone() for x in wholes)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, None, *_some(partial(_Gather.apply, ctx.group, ctx.sizes, ctx.what), grads)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, ___: Any, *dots: Any) -> Any:
        return _some(partial(_Rows.apply, ctx.group, ctx.sizes, ctx.what), dots)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, what: str, *tensors: Tensor) -> Any:
        ctx.group, ctx.what = group, what
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *_some(partial(_Total.apply, ctx.group, ctx.what), grads)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *dots: Any) -> Any:
        return tuple(None if d is None else d.view_as(d) for d in dots)


class _Total(torch.autograd.Function):
    """The sums over the processes, in one message for each dtype."""

    @staticmethod
    def forward(ctx: Any, group: Group, what: str, *partials: Tensor) -> Any:
        ctx.group, ctx.what = group, what
        ctx.set_materialize_grads(False)
        return tuple(group.sum_raw(what, partials))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *_some(partial(_Enter.apply, ctx.group, ctx.what), grads)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *dots: Any) -> Any:
        return _some(partial(_Total.apply, ctx.group, ctx.what), dots)


def _apply(function: Any, *arguments: Any) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = function.apply(*arguments)
    return made


def _some(function: Callable[..., Any], tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """function of those that are not None, at their places. Which those are is the same on every process."""
    there = [i for i, t in enumerate(tensors) if t is not None]
    made = dict(zip(there, function(*(tensors[i] for i in there)), strict=True)) if there else {}
    return tuple(made.get(i) for i in range(len(tensors)))


def _moves(t: Tensor) -> bool:
    """Whether a derivative goes through t."""
    if torch.is_grad_enabled() and t.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


# ---- the processes --------------------------------------------------------------------------------


class _Division(NamedTuple):
    """Who has how many of n rows. A process without any runs the first row and gives none of what it makes."""

    sizes: tuple[int, ...]
    rank: int

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @property
    def own(self) -> int:
        return self.sizes[self.rank]

    @property
    def run(self) -> int:
        return max(1, self.own)

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank]) if self.own else 0


class Group:
    """The processes that train together; `rank` is this one's place among them. Tensors that are given to it lie on
    the device of their process group."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = size, rank
        self.messages: Counter[str] = Counter()  # that were sent, by what for
        self.bytes: Counter[str] = Counter()  # in them: what is gathered or summed, of all processes
        self._inside: _Division | None = None  # the work that is being divided
        self._covered: set[nn.Module] = set()  # whose parameters have entered it
        self._weights: dict[Any, Tensor] = {}
        self.flagged = False  # see batches

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    # -- messages --

    def send_gather(self, every: Tensor, mine: Tensor) -> None:
        _all_gather(every, mine)

    def send_sum(self, flat: Tensor) -> None:
        dist.all_reduce(flat)

    def own(self, whole: Tensor, sizes: Sequence[int]) -> Tensor:
        """This process's rows."""
        start = sum(sizes[: self.rank])
        return whole[start : start + sizes[self.rank]]

    def gather_raw(self, what: str, parts: Sequence[tuple[Tensor, Sequence[int]]]) -> list[Tensor]:
        """The rows of all processes of each tensor, of any dtype, in one message; who has how many is known."""
        slots, pieces = [], []
        for part, sizes in parts:
            row = part[:1].nbytes if len(part) else math.prod(part.shape[1:]) * part.element_size()
            slot = -(-max(sizes) * row // 16) * 16  # any dtype may begin there
            piece = part.contiguous().reshape(-1).view(torch.uint8)
            pieces.append(nn.functional.pad(piece, (0, slot - len(piece))))
            slots.append(slot)
        mine = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        every = mine.new_empty(self.size * len(mine))
        self.send_gather(every, mine)
        self.messages[what] += 1
        self.bytes[what] += len(every)
        results = []
        for (part, sizes), all_of in zip(parts, every.view(self.size, -1).split(slots, 1), strict=True):
            row = math.prod(part.shape[1:]) * part.element_size()
            flat = torch.cat([piece[: n * row] for piece, n in zip(all_of, sizes, strict=True)])
            results.append(flat.view(part.dtype).view(sum(sizes), *part.shape[1:]))
        return results

    def sum_raw(self, what: str, partials: Sequence[Tensor]) -> list[Tensor]:
        results: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(t.dtype for t in partials):
            chosen = [i for i, t in enumerate(partials) if t.dtype == dtype]
            flat = torch.cat([partials[i].reshape(-1) for i in chosen])
            self.send_sum(flat)
            self.messages[what] += 1
            self.bytes[what] += flat.nbytes
            for i, piece in zip(chosen, flat.split([partials[i].numel() for i in chosen]), strict=True):
                results[i] = piece.view(partials[i].shape)
        return [results[i] for i in range(len(partials))]

    def gather(self, what: str, sizes: tuple[int, ...], *parts: Tensor) -> tuple[Tensor, ...]:
        if any(map(_moves, parts)):
            return _apply(_Gather, self, sizes, what, *parts)
        return tuple(self.gather_raw(what, [(p, sizes) for p in parts]))

    def enter(self, what: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _apply(_Enter, self, what, *tensors)

    def together(self, do: Callable[[], T]) -> T:
        """do() on every process; what goes wrong on one of them is raised on all."""
        return self._exchange(do, False)[0]

    def every(self, do: Callable[[], T]) -> list[T]:
        """The same, and what it gave on each of them."""
        return self._exchange(do, True)

    def write(self, do: Callable[[], T]) -> T | None:
        """do() on the first process; its error is raised on all. The others wait, and get None."""
        return self.together(lambda: do() if self.first else None)

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Inside, meta-gradients sum nothing over processes, as all have the same batches."""
        token = replicated.set(self.size > 1)
        try:
            yield
        finally:
            replicated.reset(token)

    def _exchange(self, do: Callable[[], T], results: bool) -> list[T]:
        if self.size == 1:
            return [do()]
        mine: Any = None
        error: BaseException | None = None
        try:
            mine = do()
        except (Exception, Interrupted) as raised:
            error = raised
        every: list[Any] = [None] * self.size
        dist.all_gather_object(
            every, (error and _sendable(error), mine if results and error is None else None)
        )
        self._raise([e for e, _ in every], error)
        return [made for _, made in every] if results else [mine]

    def _raise(self, errors: Sequence[bytes | None], own: BaseException | None) -> None:
        """Raise the first of the processes' errors, if there is any."""
        rank = next((i for i, e in enumerate(errors) if e is not None), None)
        if rank is None:
            return
        error: Any = own if rank == self.rank and own is not None else pickle.loads(errors[rank])  # type: ignore[arg-type]
        if any(e is None for e in errors) and isinstance(error, Exception):  # not everybody's
            error.args = (f"process {rank} of {self.size}: {error}",)
        error.everywhere = True
        raise error

    # -- the batch --

    def shares(self, batches: Sequence[Sequence[int]]) -> list[list[int]]:
        """Of each batch of items, those that this process loads: its rows, or the first where it has none."""
        if self.size == 1:
            return [list(batch) for batch in batches]
        divided = [(batch, self.divide(len(batch))) for batch in batches]
        return [list(batch[d.start : d.start + d.run]) for batch, d in divided]

    def any(self, *flags: bool) -> list[bool]:
        """Whether each is set on any process."""
        if self.size == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32)
        self.send_sum(counts)
        self.messages["flags"] += 1
        self.bytes["flags"] += counts.nbytes
        return [n > 0 for n in counts.tolist()]

    def batches(
        self, loader: Iterator[Any], sizes: Sequence[int], flag: Callable[[], bool] = lambda: False
    ) -> Iterator[Any]:
        """The whole batches, of so many rows, of what this process loads of each. Where one process cannot load its
        rows, all raise its error. `flagged` says of each batch whether flag() was true on any process."""
        if self.size == 1:
            yield from loader
            return
        for count in sizes:
            batch, error = None, None
            try:
                batch = next(loader)
            except Exception as raised:
                error = raised
            failed, self.flagged = self.any(error is not None, flag())
            if failed:
                self.together(partial(_fail, error))
            division = self.divide(count)
            leaves, tree = pytree.tree_flatten(batch)
            parts = [(leaf[: division.own], division.sizes) for leaf in leaves]
            yield pytree.tree_unflatten(self.gather_raw("batch", parts), tree)

    # -- networks --

    def divide(self, rows: int) -> _Division:
        """As even as it goes, in order."""
        ends = [rows * (i + 1) // self.size for i in range(self.size)]
        return _Division(tuple(b - a for a, b in zip([0, *ends], ends, strict=False)), self.rank)

    @contextmanager
    def dividing(self, method: nn.Module) -> Iterator[None]:
        """Inside, the method's networks work on their rows alone. For a whole training step."""
        if self.size == 1:
            yield
            return
        global _current
        patches = list(self._patches(method))
        before, _current = _current, self
        try:
            for m, name, function in patches:
                m.__dict__[name] = function
            with self.alike():
                yield
        finally:
            for m, name, _ in patches:
                m.__dict__.pop(name, None)
            _current = before

    def _patches(self, method: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
        seen: set[tuple[nn.Module, str]] = set()
        for network in divided_networks(method):
            entries = [(network, "forward")]
            entries += [(m, name) for m in network.modules() for name in getattr(m, "rowwise", ())]
            work: list[tuple[nn.Module, str, Any]] = [(m, name, self._divided) for m, name in entries]
            for m in network.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    work.append((m, "forward", self._batch_norm))
                elif isinstance(m, DROPOUTS):
                    work.append((m, "forward", self._dropout))
            for m, name, function in work:
                if (m, name) not in seen:
                    seen.add((m, name))
                    yield m, name, partial(function, m, getattr(type(m), name).__get__(m))

    def _divided(self, module: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
        if module in self._covered:
            return original(*args, **kwargs)
        if self._inside is not None:  # of another network's hook
            with self._entered(module):
                return original(*args, **kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        rows = next((len(x) for x in leaves if isinstance(x, Tensor) and x.ndim), 0)
        if not rows:
            return original(*args, **kwargs)
        division = self.divide(rows)
        self._inside = division
        try:
            mine = self._take(division, leaves, rows)
            with self._entered(module):
                args, kwargs = pytree.tree_unflatten(mine, tree)
                made, tree = pytree.tree_flatten(original(*args, **kwargs))
        finally:
            self._inside = None
        return pytree.tree_unflatten(self._give(division, made), tree)

    def _take(self, division: _Division, leaves: Sequence[Any], rows: int) -> list[Any]:
        """This process's rows of the tensors that have so many."""
        result = list(leaves)
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.ndim and len(x) == rows]
        moving = [i for i in places if _moves(leaves[i])]
        if moving:
            taken = _apply(_Rows, self, division.sizes, "input gradients", *(leaves[i] for i in moving))
            result = [dict(zip(moving, taken, strict=True)).get(i, x) for i, x in enumerate(leaves)]
        for i in places:
            own = result[i] if i in moving else self.own(leaves[i], division.sizes)
            # The concatenation keeps an idle process in the graph: it must answer when gradients are gathered.
            result[i] = own if division.own else torch.cat([own, leaves[i][:1].detach()])
        return result

    def _give(self, division: _Division, made: Sequence[Any]) -> list[Any]:
        """What all processes made. Tensors that have no row for each of theirs are refused."""
        places = [i for i, y in enumerate(made) if isinstance(y, Tensor)]
        for i in places:
            if not made[i].ndim or len(made[i]) % division.run:
                raise TypeError(
                    f"a network that several processes share gave a tensor of shape {tuple(made[i].shape)} for "
                    f"{division.run} rows; its first axis must be theirs"
                )
        result = list(made)
        by_factor: dict[int, list[int]] = {}
        for i in places:
            by_factor.setdefault(len(made[i]) // division.run, []).append(i)
        for factor, chosen in by_factor.items():
            sizes = tuple(factor * n for n in division.sizes)
            wholes = self.gather("outputs", sizes, *(made[i][: sizes[self.rank]] for i in chosen))
            for i, whole in zip(chosen, wholes, strict=True):
                result[i] = whole
        return result

    @contextmanager
    def _entered(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module has its parameters as seen by divided work."""
        before = self._covered
        self._covered = before | set(module.modules())
        moving: dict[str, Tensor] = {}
        if (
            torch.is_grad_enabled()
        ):  # forward mode needs nothing: the parameters' tangents are replicated, too
            moving = {n: p for n, p in module.named_parameters() if p.requires_grad}
        swap: Any = nullcontext()
        if moving:
            entered = self.enter("gradients", *moving.values())
            swap = _reparametrize_module(module, dict(zip(moving, entered, strict=True)), tie_weights=True)
        try:
            with swap:
                yield
        finally:
            self._covered = before

    def whole(self, rows: Tensor) -> Tensor:
        """For hooks on a part of a network: the rows of all processes of what the part was given on each."""
        division = self._inside
        if division is None:
            return rows
        factor = len(rows) // division.run
        sizes = tuple(factor * n for n in division.sizes)
        (result,) = self.gather("outputs", sizes, rows[: sizes[self.rank]])
        return result

    # -- layers that mix rows, or draw --

    def _batch_norm(self, module: Any, original: Any, x: Tensor) -> Tensor:
        """With the statistics of all processes' rows: means and variances in one message, combined by Chan's
        formula; their gradients in another."""
        division = self._inside
        if division is None or not (module.training or module.running_mean is None):
            result: Tensor = original(x)
            return result
        module._check_input_dim(x)
        count = len(x) // division.run * division.rows * math.prod(x.shape[2:])
        if count <= 1:
            raise ValueError(
                f"batch norm needs more than 1 value per channel when training, got {tuple(x.shape)}"
            )
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
        (every,) = self.gather("norms", (1,) * self.size, torch.stack([mean, var])[None])
        share = self._shares_of(division, every)
        mean = (share * every[:, 0]).sum(0)
        var = (share * (every[:, 1] + (every[:, 0] - mean).square())).sum(0)
        if module.training and module.track_running_stats and module.running_mean is not None:
            with torch.no_grad():
                module.num_batches_tracked.add_(1)
                momentum = module.momentum
                if momentum is None:
                    momentum = 1 / float(module.num_batches_tracked)
                for kept, new in (
                    (module.running_mean, mean),
                    (module.running_var, var * count / (count - 1)),
                ):
                    kept.mul_(1 - momentum).add_(new.detach().to(kept.dtype), alpha=momentum)
        if _moves(var):
            mean, var = self.enter("norms", mean, var)
        scale = (var + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight
        shift = -mean * scale if module.bias is None else module.bias - mean * scale
        shape = (1, -1, *(1,) * (x.ndim - 2))
        y: Tensor = torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(x.dtype)
        return y

    def _shares_of(self, division: _Division, like: Tensor) -> Tensor:
        """(size, 1): the share of each process in the rows."""
        key = (division.sizes, like.dtype, like.device)
        if key not in self._weights:
            shares = [[n / division.rows] for n in division.sizes]
            self._weights[key] = torch.tensor(shares, dtype=like.dtype, device=like.device)
        return self._weights[key]

    def _dropout(self, module: Any, original: Any, x: Tensor) -> Tensor:
        """By this process's rows of the mask that one process would draw."""
        division = self._inside
        if division is None or not module.training or not module.p:
            result: Tensor = original(x)
            return result
        factor = len(x) // division.run
        shape = list(x.shape)
        shape[0] = factor * division.rows
        if type(module) is not nn.Dropout:  # of whole channels
            shape[2:] = [1] * (x.ndim - 2)
        ones = x.new_ones(shape)
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        if x.ndim in layouts and not x.is_contiguous() and x.is_contiguous(memory_format=layouts[x.ndim]):
            ones = ones.contiguous(memory_format=layouts[x.ndim])  # draws go along memory
        mask: Tensor = original(ones)
        return x * mask[factor * division.start : factor * (division.start + division.run)]

    # -- watching --

    def compare(self, state: Mapping[str, Tensor], when: str) -> None:
        """RuntimeError unless these tensors are the same bits on all processes."""
        if self.size == 1:
            return
        sums = {name: _checksum(t) for name, t in state.items()}
        every = self.every(lambda: sums)
        for rank, others in enumerate(every):
            odd = [name for name, value in every[0].items() if others.get(name) != value]
            if odd:
                error = RuntimeError(
                    f"{when}: {len(odd)} of {len(sums)} tensors, {odd[0]} first, differ between processes 0 and "
                    f"{rank}; all must compute alike: the same GPUs, versions and settings"
                )
                error.everywhere = True  # type: ignore[attr-defined]
                raise error


def divided_networks(method: nn.Module) -> list[nn.Module]:
    """The method's networks that processes share (see above)."""
    found: list[nn.Module] = []
    for child in method.children():
        if isinstance(child, nn.ModuleList):
            found += divided_networks(child)
        elif _convolves(child) and not any(_mixes(m) for m in child.modules()):
            found.append(child)
    return found


def _convolves(network: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in network.modules())


def _mixes(m: nn.Module) -> bool:
    tracked = isinstance(m, nn.modules.instancenorm._InstanceNorm) and m.track_running_stats
    fused = isinstance(m, DualNorm) and isinstance(m, nn.modules.batchnorm._BatchNorm)
    return isinstance(m, UNDIVIDED) or tracked or fused


_current: Group | None = None


def whole(rows: Tensor) -> Tensor:
    """`Group.whole` of the group that divides the work now; outside of that, what it is given."""
    return rows if _current is None else _current.whole(rows)


def _fail(error: Exception | None) -> None:
    if error is not None:
        raise error


def _sendable(error: BaseException) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
        return data
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
