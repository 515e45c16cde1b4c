"""README.md's tables of results and speed, written between marks from the records."""

import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

from cmamba_jax.errors import UserError
from cmamba_jax.results.records import Record
from cmamba_jax.train.sweep import shown


def write_readme(records: Sequence[Record], path: pathlib.Path) -> int:
    """Writes the tables of a file anew, between ``<!-- results: NAME -->`` and ``<!-- end -->``.

    Args:
        records: what was measured.
        path: Markdown file with such marks; NAME is one of `TABLES`.

    Returns:
        Number of tables.

    Raises:
        UserError: a mark names no table, or does not end.
    """
    text = path.read_text(encoding="utf-8")
    new, count = render(records, text)
    if new != text:
        path.write_text(new, encoding="utf-8")
    return count


def render(records: Sequence[Record], text: str) -> tuple[str, int]:
    """The text with its marked tables written anew, and their number; see `write_readme`."""
    begins = len(re.findall(r"<!-- results: ", text))

    def table(match: re.Match) -> str:
        name = match["name"]
        if name not in TABLES:
            raise UserError(f"there is no table {name!r}; expected one of {', '.join(TABLES)}")
        return f"<!-- results: {name} -->\n{TABLES[name](records)}<!-- end -->"

    pattern = r"<!-- results: (?P<name>[\w ]+) -->\n(?:(?!<!-- results: ).)*?<!-- end -->"
    new, count = re.subn(pattern, table, text, flags=re.DOTALL)
    if count != begins:
        raise UserError(f"{begins} tables begin with <!-- results: NAME -->, but {count} of them end with <!-- end -->")
    return new, count


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _of(records: Sequence[Record], *kinds: str) -> list[Record]:
    return [record for record in records if record["kind"] in kinds]


def _where(record: Record) -> str:
    return f"{record['device']}; {record['versions']}"


def _experiments(records: Sequence[Record]) -> str:
    rows = []
    for record in _of(records, "crossval"):
        name = record["monitor"]
        folds = ", ".join(shown(name, fold[name]) for fold in record["folds"])
        value = f"{name.replace('_', ' ')} {shown(name, record['mean'][name], record['std'][name])} (folds {folds})"
        rows.append([record["name"], value, f"`{record['command']}`"])
    for record in _of(records, "sweep"):
        name = (record["metrics"] or [record["monitor"]])[0]
        values = (f"{row['label']} {shown(name, row['test'][name], row['std'].get(name))}" for row in record["rows"])
        rows.append([record["name"], f"{name.replace('_', ' ')}: {'; '.join(values)}", f"`{record['command']}`"])
    return _markdown(["experiment", "test", "command"], rows)


def _scan(records: Sequence[Record]) -> str:
    parts = []
    for record in _of(records, "scan"):
        case = record["case"]
        sizes = ", ".join(f"{axis} {case[axis]}" for axis in "MBLDN")
        parts.append(f"`{record['command']}`: {sizes}, {case['dtype']}; medians of {record['repeats']}; "
                     f"{_where(record)}.\n")  # fmt: skip
        heads = ["", "forward ms", "temporary MiB", "forward + backward ms", "temporary MiB"]
        rows = [
            [f"`{r['name']}`", *(f"{r[key] / scale:.0f}" for key, scale in (
                ("forward_ms", 1), ("forward_temp_bytes", 2**20),
                ("forward_backward_ms", 1), ("forward_backward_temp_bytes", 2**20)))]
            for r in record["results"]
        ]  # fmt: skip
        parts.append(_markdown(heads, rows))
    return "\n".join(parts)


def _device(records: Sequence[Record]) -> str:
    by_place: dict[str, list[Record]] = {}
    for record in _of(records, "device_table"):
        by_place.setdefault(_where(record), []).append(record)
    parts = []
    for where, group in by_place.items():
        commands = ", ".join(f"`{record['command']}`" for record in group)
        repeats = ", ".join(dict.fromkeys(str(record["repeats"]) for record in group))
        parts.append(f"{commands}: M 3, bfloat16, with skip, gate, bias and softplus; medians of {repeats}; {where}.\n")
        heads = ["(B, L, D, N)", "scan", "forward ms", "forward + backward ms", "floor / forward", "extra memory"]
        parts.append(_markdown(heads, [row for record in group for row in _device_rows(record)]))
    return "\n".join(parts)


def _device_rows(record: Record) -> Iterable[list[str]]:
    for result in record["results"]:
        case, floor = result["case"], result["floor_ms"]
        label = f"{result['shape']} ({', '.join(str(case[axis]) for axis in 'BLDN')})"
        for name, values in result.items():
            if not isinstance(values, dict) or "forward_ms" not in values:
                continue
            share = ""
            if "input_bytes" in values:
                share = f"{100 * values['forward_backward_temp_bytes'] / values['input_bytes']:.0f}%"
            forward, both = values["forward_ms"], values.get("forward_backward_ms")
            yield [
                label,
                values.get("implementation", name),
                f"{forward:.2f}",
                f"{both:.2f}" if both else "failed",
                f"{max(floor.values()) / forward:.2f}",
                share,
            ]


def _scaling(records: Sequence[Record]) -> str:
    rows = []
    for record in _of(records, "scaling"):
        for case in record["cases"]:
            model = case["model"]
            what = (
                f"{case['case']}: axis {case['axis']}, {case['length']:,} steps, batch {case['batch']:,}, width "
                f"{model['d_model']}, {model['d_state']} states, {model['n_layers']} layers, {model['compute_dtype']}"
            )
            for count, result in case["results"].items():
                memory = result["peak_bytes"] or result["memory_bytes"]
                rows.append([
                    what,
                    count,
                    f"{result['steps_per_second']:.1f}",
                    f"{result['efficiency']:.2f}" if result["efficiency"] else "",
                    f"{memory / 2**20:,.0f}",
                    f"{result['sent_bytes'] / 2**20:.1f}",
                    f"`{record['command']}`",
                    _where(record),
                ])  # fmt: skip
    heads = ["case", "devices", "steps a second", "efficiency", "MiB a device", "MiB sent a step", "command", "on"]
    return _markdown(heads, rows)


def _efficiency(records: Sequence[Record]) -> str:
    from cmamba_jax.bench.efficiency import KINDS, MODELS, less, memory_of, percent

    parts = []
    for record in _of(records, "efficiency"):
        kinds = [kind for kind in KINDS if kind in record["results"][0]]
        sizes = ", ".join(f"{name.replace('_', '-')} {m['parameters']:,}" for name, m in record["models"].items())
        counted = any(r[kind][name].get("peak_bytes") for r in record["results"] for kind in kinds for name in MODELS)
        parts.append(f"`{record['command']}`: batch {record['batch']}, {record['dtype']}, parameters: {sizes}; medians "
                     f"of up to {record['repeats']}; memory by the {'device' if counted else 'compiler'}; "
                     f"{_where(record)}.\n")  # fmt: skip
        heads = ["steps", *(f"{kind}, {unit}" for kind in kinds for unit in ("MiB", "less", "ms", "less"))]
        rows = []
        for result in record["results"]:
            cells = [f"{result['length']:,}"]
            for kind in kinds:
                pair = [result[kind][name] | {"memory": memory_of(result[kind][name])} for name in MODELS]
                memory = (f"{r['memory'] / 2**20:,.0f}" if r["memory"] else "?" for r in pair)
                times = (f"{r['ms']:,.0f}" if "ms" in r else r["error"] for r in pair)
                cells += [" / ".join(memory), percent(less(*pair, "memory"))]
                cells += [" / ".join(times), percent(less(*pair, "ms"))]
            rows.append(cells)
        parts.append(_markdown(heads, rows))
    return "\n".join(parts)


def _conv(records: Sequence[Record]) -> str:
    parts = []
    for record in _of(records, "conv"):
        parts.append(
            f"`{record['command']}`: M 3, bfloat16, 4 taps; medians of {record['repeats']}; {_where(record)}.\n"
        )
        heads = ["(B, L, D)", "by", "forward ms", "bytes / forward"]
        heads += ["forward + backward ms", "bytes / forward + backward"]
        rows = []
        for result in record["results"]:
            label = f"{result['shape']} ({', '.join(str(result['case'][axis]) for axis in 'BLD')})"
            values = (result[kind] for kind in ("forward", "forward_backward"))
            texts = (text for v in values for text in (f"{v['ms']:.2f}", f"{v['share']:.2f}"))
            # Older records have XLA's alone.
            rows.append([label, result.get("implementation", "xla"), *texts])
        parts.append(_markdown(heads, rows))
    return "\n".join(parts)


def _host(records: Sequence[Record]) -> str:
    rows = []
    for record in _of(records, "stream"):
        values = (
            f"{r['streams']:,}: {r['median_ms']:.3g} ms, {r['stream_steps_per_s']:,.0f} answers a second"
            for r in record["results"]
        )
        rows.append(["live streams at once: median of a step, all answers", "; ".join(values), record])
    for record in _of(records, "step"):
        rows.append([
            "host time of a training step against a hand-written `jax.jit` step",
            f"{record['call_ratio']:.2f} times until the call returns, {record['ready_ratio']:.2f} until the result",
            record,
        ])  # fmt: skip
    for record in _of(records, "seeds"):
        rows.append([
            f"{len(record['seeds'])} seeds together against one after another, {record['config']}, "
            f"{record['epochs']} epochs, with start, compilation and reports",
            f"{record['apart_seconds']:.0f} s against {record['together_seconds']:.0f} s: {record['ratio']:.2f} times",
            record,
        ])  # fmt: skip
    cells = ([what, value, f"`{r['command']}`", _where(r)] for what, value, r in rows)
    return _markdown(["what", "result", "command", "on"], cells)


def _tpu(records: Sequence[Record]) -> str:
    parts = []
    for record in _of(records, "tpu_static"):
        parts.append(f"`{record['command']}`: {record['chip']}, {record['case']}; predictions of libtpu "
                     f"{record['libtpu']}, not measurements; {record['versions']}.\n")  # fmt: skip
        rows = [[r["name"], f"{r['bundles_per_step']:.0f}"] for r in record["results"]]
        parts.append(_markdown(["loop over time", "bundles for a step of 128 channels, all modalities"], rows))
    return "\n".join(parts)


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "experiments": _experiments,
    "scan": _scan,
    "device": _device,
    "conv": _conv,
    "efficiency": _efficiency,
    "host": _host,
    "scaling": _scaling,
    "tpu": _tpu,
}
"""What a mark can name."""
