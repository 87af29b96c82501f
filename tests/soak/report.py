"""What a soak found: promises that were kept or not, and numbers."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """`broken` is empty when everything that was promised happened, and nothing else."""

    settings: dict[str, Any]
    circumstances: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    duration_s: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    audits: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    at_the_end: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, Any] = field(default_factory=dict)

    def expect(self, condition: bool, otherwise: str) -> None:
        if not condition:
            self.broken.append(otherwise)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def text(self) -> str:
        count = sum(n for name, n in self.requests.items() if name.startswith("kind "))
        lines = [f"{count} requests in {self.duration_s:.0f} s, {count / max(self.duration_s, 1e-9):.1f} per second"]
        for title in ("requests", "reasons", "faults", "audits", "answers", "metrics", "at_the_end"):
            lines += ["", title.replace("_", " ")]
            lines += [f"  {name:52} {_short(value)}" for name, value in sorted(getattr(self, title).items())]
        resources = {name: value for name, value in self.resources.items() if not isinstance(value, list)}
        lines += ["", "resources", *(f"  {name:52} {_short(value)}" for name, value in resources.items())]
        lines += ["", "kept" if not self.broken else f"NOT KEPT ({len(self.broken)}):"]
        return "\n".join(lines + [f"  {problem}" for problem in self.broken[:40]])


def read_audits(events: list[dict[str, Any]], resolution: float, report: Report) -> None:
    """Faults, audits and violations of the journal; the replays' gaps against their own noise."""
    report.faults = dict(Counter(e["site"] + (" (late)" if e["late"] else "") for e in events if e["kind"] == "fault"))
    audits: Counter[str] = Counter(e["what"] for e in events if e["kind"] == "audit")
    replays = [e for e in events if e["kind"] == "replay"]
    noise = max((e["noise"] for e in replays if e["noise"] is not None), default=0.0)
    # Two results, each off by the noise; and a spacing of float32 numbers as large as the largest element.
    bound = 2 * noise + resolution * max((e["size"] for e in replays), default=0.0)
    gaps = sorted(e["gap"] for e in replays)
    report.audits |= {
        **audits,
        "moved rows": sum(1 for e in events if e["kind"] == "audit" and e.get("delta")),
        "replays": len(replays),
        "replay noise": noise,
        "replay bound": bound,
        "replay largest gap": gaps[-1] if gaps else 0.0,
        "replay median gap": gaps[len(gaps) // 2] if gaps else 0.0,
        "blocks taken away": sum(e["kind"] == "asked_again" for e in events),
    }
    report.broken += [f"replay of {e['request']} is {e['gap']:.2e} off" for e in replays if not e["gap"] <= bound]
    violations = [e for e in events if e["kind"] == "violation"]
    report.broken += [f"{what}, {count} times" for what, count in Counter(e["what"] for e in violations).items()]
    for name in ("written", "entry", "reused", "moved rows", "replays"):
        report.expect(report.audits.get(name, 0) > 0, f"no audit of kind {name!r} took place")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
