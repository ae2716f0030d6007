"""Releases the suite has passed with: `tested.json`, the line of the README made from it, and what is newer here.

python tests/tested.py ENVIRONMENT...    # after a passed suite: `make test` calls it with its environments
"""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


HERE = Path(__file__).resolve().parent
RECORD, README = HERE / "data" / "tested.json", HERE.parent / "README.md"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub", "gradio", "evaluate")
MARK = "Tested with "


def installed(python: str = sys.executable, path: str = "") -> dict[str, str]:
    """Versions of `PACKAGES` in an environment, of those that it has; `path` comes first there."""
    if python == sys.executable and not path:
        found = {}
        for name in PACKAGES:
            try:
                found[name] = version(name).split("+")[0]
            except PackageNotFoundError:
                pass
        return found
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import tested; print(json.dumps(tested.installed()))"
    environment = {"PYTHONPATH": path} if path else {}
    done = subprocess.run([python, "-c", code, str(HERE)], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def order(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part.isdigit())


def recorded() -> dict[str, list[str]]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def line(record: dict[str, list[str]]) -> str:
    """The README's line: from the oldest to the newest release of each package."""
    parts = []
    for name in PACKAGES:
        versions = sorted(record.get(name, ()), key=order)
        if name == "transformers":
            old = [release for release in versions if release.startswith("4.")]
            versions = [release for release in versions if release not in old]
        if versions:
            parts.append(f"{name} {versions[0]}" + (f" to {versions[-1]}" if len(versions) > 1 else ""))
        if name == "transformers" and old:
            parts[-1] += f" (saved models load on {' and '.join(old)})"
    return f"{MARK}{', '.join(parts)} (`make test` writes this line)."


def newer() -> list[str]:
    """Packages here that are newer than any the suite has passed with, by name."""
    record = recorded()
    found = []
    for name, release in installed().items():
        known = max(record.get(name, ["0"]), key=order)
        if order(release) > order(known):
            found.append(f"{name} {release} (the suite last passed with {known})")
    return found


def main(environments: list[str]) -> None:
    record = {name: set(versions) for name, versions in recorded().items()}
    for environment in map(Path, environments):
        paths = [path for path in environment.glob("transformers-*") if path.is_dir()]
        for path in ("", *map(str, paths)):
            for name, release in installed(str(environment / "bin" / "python"), path).items():
                if "rewardbench" not in environment.name or name == "transformers":  # models are only loaded there
                    record.setdefault(name, set()).add(release)
    content = {name: sorted(record[name], key=order) for name in PACKAGES if name in record}
    RECORD.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    before = next(row for row in text.splitlines() if row.startswith(MARK))
    README.write_text(text.replace(before, line(content)), encoding="utf-8")
    print(line(content))


if __name__ == "__main__":
    main(sys.argv[1:])
