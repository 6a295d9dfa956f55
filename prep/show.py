"""What the commands print for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smoe.prep.progress import duration
from smoe.prep.replay.routing_trace import Trace

if TYPE_CHECKING:
    from smoe.prep.inspect import Inspection


def families_text(found: list[dict[str, str]], version: str) -> str:
    lines = [f"{len(found)} families of transformers {version} offer the experts interface:"]
    for family in found:
        lines.append(
            f"  {family['family']:22} {family['experts']:24} {family['text'] or 'no model generates text'}"
        )
    return "\n".join(lines)


def inspection_text(about: Inspection, encoding: str, tokens: int) -> str:
    used = "" if about.top_k is None else f", {about.top_k} used per token"
    active = (
        ""
        if about.active_parameters is None
        else f", {about.active_parameters / 1e9:.2f} billion used per token"
    )
    hours = "" if about.seconds is None else f"; about {duration(about.seconds)} on this machine"
    weights = about.weights or f"all there, {_size(about.download)}"
    return "\n".join([
        f"{about.family} ({about.architecture}): "
        + (f"cannot be prepared: {about.refusal}" if about.refusal else "can be prepared"),
        f"{about.layers} MoE layers of {about.experts} experts{used}; hidden {about.hidden}, width {about.width}",
        f"{about.parameters / 1e9:.2f} billion parameters, {about.expert_parameters / 1e9:.2f} in experts{active}",
        f"weights: {weights}",
        f"bundle: about {_size(about.bundle)} with experts in {encoding}",
        f"device: from {_size(about.device[0])} to {_size(about.device[1])} with all experts in memory, and the "
        "KV cache",
        f"build: about {_size(about.disk)} of disk, {_size(about.memory)} of memory for {tokens} tokens{hours}",
    ])  # fmt: skip


def simulation_text(trace: Trace, about: dict, substituted: bool) -> str:
    cycle, tokens = (
        trace.show(trace.token_cycle),
        sum(s.decode for s in trace.steps) // len(trace.experts),
    )
    lines = [
        f"{trace.name}: {len(trace.experts)} MoE layers, {sum(trace.experts)} experts, {trace.show(trace.total)}; "
        f"{tokens} tokens decoded, each of which uses {cycle}",
    ]
    if not about["trace"]["exact_bound"]:
        lines.append(
            "records differ in length between layers: belady is then near the bound in bytes, not it"
        )
    lines.append(
        f"{'budget':>12}  {'policy':14} {'hits':>7}  {'decode':>7}  {'to belady':>9}  {'read':>12}  {'per token':>10}"
        + ("  after substitution  substituted" if substituted else "")
    )
    for row in about["rows"]:
        read = row["bytes_read"]
        lines.append(
            f"{trace.show(row['budget']):>12}  {row['policy']:14} {row['hit_rate']:7.2%}  {row['decode_hit_rate']:7.2%}  "
            f"{row['to_bound']:9.2%}  {trace.show(read):>12}  {row['loads'] / max(1, tokens):10.1f}"
            + (
                f"  {row['after_hit_rate']:18.2%}  {row['substituted_share']:11.2%}"
                if substituted
                else ""
            )
        )
    return "\n".join(lines)


def _size(nbytes: int | None) -> str:
    return (
        f"{(nbytes or 0) / 1e9:.1f} GB" if (nbytes or 0) >= 1e9 else f"{(nbytes or 0) / 1e6:.0f} MB"
    )


def profile_text(about: dict) -> str:
    lines = [
        f"{about['model']}: {about['calibration']['tokens']} tokens of {about['calibration']['source']}",
        f"{'layer':32} experts  unreached  effective  busiest  output similarity  best stand-in error",
    ]
    for layer in about["layers"]:
        similarity, error = layer["mean_output_similarity"], layer["best_standin_error"]
        lines.append(
            f"{layer['name']:32} {layer['experts']:7}  {len(layer['unreached']):9}  {layer['effective_experts']:9}"
            f"  {layer['busiest_share']:7.1%}  {similarity!s:>17}  {error!s:>19}"
        )
    return "\n".join(lines)
