"""Writes the software bill of materials of a wheelhouse, or of an environment that is installed, as CycloneDX JSON.

cyclonedx-py reads names, versions, licences and who needs whom from what is installed. A wheelhouse is not, so the metadata of its wheels
are laid out as an empty environment's, without their gigabytes; then each component gets the SHA-256 of its wheel. Owns that layout and
what is added. Must not know how wheelhouses and images are made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, Final

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

SPECIFICATION: Final = "1.6"  # CycloneDX's newest that the usual readers take
METADATA_FILES: Final = frozenset({"METADATA", "WHEEL", "RECORD", "INSTALLER", "top_level.txt", "entry_points.txt"})
TIMEOUT_S: Final = 300.0


class SbomError(Exception):
    """What went wrong, on what, and what to do."""


def main() -> int:
    """`tools/sbom.py --name NAME (--wheels FOLDER | --python PYTHON) --out FILE`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="what it is the bill of, as cosilo-site")
    parser.add_argument("--release", default="0.1.0", help="its version")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--wheels", type=Path, help="a folder made by deploy/airgap/wheelhouse")
    source.add_argument("--python", type=Path, help="the interpreter of an environment that is installed, as an image's")
    parser.add_argument("--out", type=Path, required=True, help="the file that is written")
    given = parser.parse_args()
    try:
        bill = of_wheels(given.wheels) if given.wheels else of_environment(given.python)
        name_it(bill, given.name, given.release)
        text = validated(bill)
    except (SbomError, OSError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
        print(f"error: sbom: {error}", file=sys.stderr)
        return 1
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")
    print(f"{given.out}: {len(bill['components'])} components, CycloneDX {SPECIFICATION}")
    return 0


def of_wheels(folder: Path) -> dict[str, Any]:
    """A bill with a component for each wheel of a folder, each with its SHA-256. Raises SbomError where one is missing."""
    wheels = {_component(wheel): wheel for wheel in sorted(folder.glob("*.whl"))}
    if not wheels:
        raise SbomError(f"{folder} holds no wheels; make it with deploy/airgap/wheelhouse")
    with tempfile.TemporaryDirectory(prefix="cosilo-sbom-") as scratch:
        environment = Path(scratch)
        venv.create(environment, with_pip=False, symlinks=True)
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": scratch, "platbase": scratch}))
        for wheel in wheels.values():
            _lay_out(wheel, packages)
        bill = of_environment(environment / "bin" / "python")
    listed = {(normal(entry["name"]), entry["version"]): entry for entry in bill["components"]}
    if listed.keys() != wheels.keys():
        raise SbomError(f"{folder}: the wheels and the bill differ in {sorted(listed.keys() ^ wheels.keys())}")
    for key, wheel in wheels.items():
        with wheel.open("rb") as content:
            listed[key]["hashes"] = [{"alg": "SHA-256", "content": hashlib.file_digest(content, "sha256").hexdigest()}]
    return bill


def of_environment(python: Path) -> dict[str, Any]:
    """A bill of what an interpreter finds installed; the same for the same packages. Raises SbomError with cyclonedx-py's words."""
    tool = Path(sys.executable).with_name("cyclonedx-py")
    command = [str(tool), "environment", "--spec-version", SPECIFICATION, "--output-reproducible", "--no-validate", "-o", "-", str(python)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise SbomError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    bill: dict[str, Any] = json.loads(done.stdout)
    return bill


def name_it(bill: dict[str, Any], name: str, release: str) -> None:
    """Says what the bill is of; the component depends on what nothing else depends on."""
    needed = {one for entry in bill.get("dependencies", []) for one in entry.get("dependsOn", [])}
    tops = sorted(entry["bom-ref"] for entry in bill["components"] if entry["bom-ref"] not in needed)
    bill.setdefault("metadata", {})["component"] = {"bom-ref": name, "type": "application", "name": name, "version": release}
    others = [entry for entry in bill.get("dependencies", []) if entry["ref"] not in ("root-component", name)]
    bill["dependencies"] = [{"ref": name, "dependsOn": tops}, *others]


def validated(bill: dict[str, Any]) -> str:
    """The bill as text that CycloneDX's own schema takes."""
    text = json.dumps(bill, indent=1, sort_keys=True) + "\n"
    wrong = JsonStrictValidator(SchemaVersion.from_version(SPECIFICATION)).validate_str(text)
    if wrong is not None:
        raise SbomError(f"the bill is not CycloneDX {SPECIFICATION}: {wrong}")
    return text


def normal(name: str) -> str:
    """A distribution's name as indexes compare it (PyPA, "Names and normalization")."""
    return name.replace("_", "-").replace(".", "-").lower()


def _component(wheel: Path) -> tuple[str, str]:
    name, version = wheel.name.split("-")[:2]
    return normal(name), version


def _lay_out(wheel: Path, packages: Path) -> None:
    """Only what describes the distribution; names from the archive go nowhere else than into its own folder."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            path = PurePosixPath(entry.filename)
            if len(path.parts) == 2 and path.parent.name.endswith(".dist-info") and path.name in METADATA_FILES:
                target = packages / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(entry))


if __name__ == "__main__":
    sys.exit(main())
