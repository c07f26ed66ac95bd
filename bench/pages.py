"""Write the figures of docs/which-kl.md from the committed summary, between its markers.

    python bench/pages.py           # write
    python bench/pages.py --check   # exit status 1 if the page and the summary disagree

As bench/report.py does for README and docs/speed.md: no figure there is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from report import ROOT, refresh
from tables import markdown, prose

RIGHT, WRONG = "mean of the KLs", "KL of the mean"


def trainings(summary: dict[str, Any]) -> str:
    """What the two trainings came to."""
    right, wrong = (summary["results"][name] for name in (RIGHT, WRONG))
    setup = f"""8x8 digits, {summary["images"]} images, 2-D latent, {summary["epochs"]} epochs, seed
        {summary["seed"]}, torch {summary["torch"]}."""
    rows = [
        [label, *(f"{result[field]:.2f}" for result in (right, wrong))]
        for label, field in (
            ("mean of the KLs", "kl"),
            ("KL of the mean", "kl_of_mean"),
            ("reconstruction error", "reconstruction"),
            ("ELBO", "elbo"),
        )
    ]
    share = [f"{r['share_of_codes_within_2_std']:.0%}" for r in (right, wrong)]
    rows.append(["codes within 2 std of the prior", *share])
    outside = [f"{1 - r['share_of_codes_within_2_std']:.0%}" for r in (right, wrong)]
    text = f"""Trained with the KL of the mean, that KL stays at {wrong["kl_of_mean"]:.2f} nats,
        while the KL that the images really cost is {wrong["kl"]:.1f} nats,
        {wrong["kl"] / right["kl"]:.0f} times that of the other training: {outside[1]} of the codes
        lie more than two standard deviations of the prior out ({outside[0]} in the other). The
        little that the reconstruction gains is bought with it: the ELBO is
        {right["elbo"] - wrong["elbo"]:.1f} nats worse."""
    headings = ["nats per image", *(f"trained with the {name}" for name in (RIGHT, WRONG))]
    return f"{prose(setup)}\n\n{markdown(headings, rows)}\n\n{prose(text)}"


def reports(summary: dict[str, Any]) -> str:
    """The reports as they are printed, and what to read from them."""
    right, wrong = (summary["results"][name] for name in (RIGHT, WRONG))
    of_right, of_wrong = right["report"], wrong["report"]
    text = f"""Of the training with the mean of the KLs, {of_right["information"]:.3f} of
        {of_right["kl"]:.3f} nats are information, and {of_right["aggregate_kl"]:.3f} the distance
        of all codes together from the prior: nearly nothing is wasted, and images do have codes of
        their own. Of the training with the KL of the mean, {of_wrong["aggregate_kl"]:.1f} of
        {of_wrong["kl"]:.1f} nats are mere distance from the prior."""
    shown = [
        f"Trained with the {name}:\n\n```\n{result['printed']}\n```"
        for name, result in ((RIGHT, right), (WRONG, wrong))
    ]
    return "\n\n".join([*shown, prose(text)])


def main() -> int:
    """Write or check; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    folder = ROOT / "docs"
    parser.add_argument("--page", type=Path, default=folder / "which-kl.md")
    parser.add_argument("--summary", type=Path, default=folder / "which-kl" / "summary.json")
    args = parser.parse_args()
    summary = json.loads(args.summary.read_text())
    sections: dict[str, str | None] = {"trainings": trainings(summary), "reports": reports(summary)}
    return refresh(args.page, sections, args.check)


if __name__ == "__main__":
    sys.exit(main())
