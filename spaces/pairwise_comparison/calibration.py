"""A reliability diagram as SVG, with its numbers as a table below. Its page colours `.reliability .dot`."""

import math


def reliability_plot(rows: list[dict], n: int) -> str:
    """Confidence against accuracy, a dot for each bin, its area the share of the pairs; on the dashed line the model
    is right as often as it says."""
    left, right, top, bottom = 46, 408, 14, 292

    def x(confidence: float) -> float:
        return left + 12 + (right - left - 12) * (confidence - 0.5) * 2  # a dot at the edge hides no number

    def y(share: float) -> float:
        return bottom - (bottom - top) * share

    parts = [
        f'<line x1="{left}" x2="{right}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="currentColor" opacity=".2"/>'
        f'<text x="{left - 7}" y="{y(share) + 5:.1f}" text-anchor="end">{share:g}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    parts += [
        f'<text x="{x(c):.1f}" y="{bottom + 20}" text-anchor="middle">{c:g}</text>'
        for c in (0.5, 0.6, 0.7, 0.8, 0.9, 1)
    ]
    parts.append(
        f'<line x1="{x(0.5)}" y1="{y(0.5)}" x2="{x(1)}" y2="{y(1)}" stroke="currentColor" stroke-dasharray="5 4"/>'
        f'<text x="{(left + right) / 2}" y="{bottom + 42}" text-anchor="middle">confidence of the model</text>'
        f'<text x="12" y="{(top + bottom) / 2}" text-anchor="middle" transform="rotate(-90 12 {(top + bottom) / 2})">'
        "accuracy</text>"
    )
    for row in rows:
        parts.append(
            f'<circle cx="{x(row["confidence"]):.1f}" cy="{y(row["accuracy"]):.1f}" '
            f'r="{4 + 14 * math.sqrt(row["n"] / n):.1f}" class="dot">'
            f"<title>{pairs(row['n'])}: confidence {row['confidence']:.3f}, accuracy "
            f"{row['accuracy']:.3f}</title></circle>"
        )
    told = "; ".join(
        f"{pairs(row['n'])} at confidence {row['confidence']:.3f}, accuracy {row['accuracy']:.3f}" for row in rows
    )
    lines = "".join(
        f'<tr><td class="number">{row["n"]:.0f}</td><td class="number">{row["confidence"]:.3f}</td>'
        f'<td class="number">{row["accuracy"]:.3f}</td></tr>'
        for row in rows
    )
    return (
        f'<svg class="reliability" viewBox="0 0 424 340" role="img" aria-label="Calibration: {told}.">'
        f"{''.join(parts)}</svg><details><summary>The dots as a table</summary><table><thead><tr>"
        "<th scope='col' class='number'>pairs</th><th scope='col' class='number'>confidence</th>"
        f"<th scope='col' class='number'>accuracy</th></tr></thead><tbody>{lines}</tbody></table></details>"
    )


def pairs(n: float) -> str:
    return f"{n:,.0f} pair{'' if n == 1 else 's'}"
