"""The picture of `ropewalk inspect --device`: tokens a second and memory over context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ropewalk.bench.devices import RESERVED, Device
from ropewalk.bench.sizes import Sizes

STYLES = ("-", "--", "-.", ":")
POINTS = 100


def plot_cost(
    models: Mapping[str, Sizes],
    devices: Sequence[Device],
    path: str,
    *,
    longest: int,
    kv_bits: int = 16,
    chunk: int | None = None,
) -> None:
    """Draw two panels: tokens a second at most, as far as the context fits, a line for each model and device; and the
    memory that each model needs, with what each device has.

    Args:
        models: name -> sizes.
        path: the PNG to write.
        longest: tokens of context, where the axes end.
        kv_bits, chunk: as `Sizes.memory` takes them.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    from ropewalk.plot import load_pyplot

    pyplot = load_pyplot()
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, 4.8), dpi=110, layout="constrained")
    contexts = [longest * i // POINTS for i in range(POINTS + 1)]
    for i, (name, sizes) in enumerate(models.items()):
        needs = [sizes.memory(n, kv_bits, chunk) / 1e9 for n in contexts]
        memory.plot(contexts, needs, color=f"C{i}", label=name, lw=2)
        for k, device in enumerate(devices):
            room = (device.memory_bytes - RESERVED) / 1e9
            fits = [n for n, need in zip(contexts, needs, strict=True) if need <= room]
            if not fits:
                continue
            limits = [device.read_gb_per_s * 1e9 / sizes.step_bytes(n, kv_bits) for n in fits]
            one = len(models) == 1
            label = device.name if one else f"{name}, {device.name}"
            colour, style = (f"C{k + 1}", "-") if one else (f"C{i}", STYLES[k % len(STYLES)])
            speed.plot(fits, limits, style, color=colour, label=label)
            if len(fits) < len(contexts):  # the end of memory, not of the axis
                speed.plot(fits[-1:], limits[-1:], "x", color=colour)
    for device in devices:
        room = (device.memory_bytes - RESERVED) / 1e9
        memory.axhline(room, color="0.5", linestyle=":", lw=1)
        place = {"xycoords": ("axes fraction", "data"), "xytext": (4, 2), "textcoords": "offset points"}
        memory.annotate(device.name, (0, room), **place, fontsize=8)
    speed.set_yscale("log")
    speed.yaxis.set_major_formatter("{x:g}")
    speed.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:g}"[0] in "25" else "")
    memory.set_ylim(0)
    for axis, title in ((speed, "tokens a second that the memory's speed allows"), (memory, "GB of memory needed")):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("context, tokens", fontsize=9)
        axis.tick_params(which="both", labelsize=8)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.spines[["top", "right"]].set_visible(False)
    speed.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    memory.legend(fontsize=8, frameon=False)
    what = ", ".join(models) if len(models) < 3 else f"{len(models)} models"
    parts = "" if chunk is None else f", prompts in parts of {chunk:,}"
    figure.suptitle(f"Calculated: {what}, one sequence, keys and values in {kv_bits} bits{parts}", fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)
