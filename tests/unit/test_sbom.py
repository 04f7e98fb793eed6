"""tools/sbom.py: what a bill of materials says of a folder of wheels, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "sbom.py"


def make_wheel(folder: Path, name: str, release: str, needs: str = "", filed_as: str = "") -> str:
    """Writes a wheel with nothing in it but its metadata; returns its SHA-256."""
    described = f"{name}-{release}.dist-info"
    files = {
        f"{described}/METADATA": f"Metadata-Version: 2.4\nName: {name}\nVersion: {release}\nLicense-Expression: MIT\n"
        + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{described}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}"
        for path, text in files.items()
    ]
    files[f"{described}/RECORD"] = "\n".join([*lines, f"{described}/RECORD,,"]) + "\n"
    path = folder / f"{filed_as or name}-{release}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in files.items():
            archive.writestr(member, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_bill(wheels: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--name", "cosilo-site", "--wheels", str(wheels), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_each_wheel_is_a_component_with_its_licence_and_digest_and_the_same_wheels_give_the_same_bytes(tmp_path: Path) -> None:
    (wheels := tmp_path / "wheels").mkdir()
    digests = {
        "upper_part": make_wheel(wheels, "upper_part", "1.0", "Lower.Part>=2"),
        "Lower.Part": make_wheel(wheels, "Lower.Part", "2.5"),
    }
    done = write_bill(wheels, tmp_path / "first.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'first.json'}: 2 components, CycloneDX 1.6\n"
    bill = json.loads((tmp_path / "first.json").read_text())
    assert bill["specVersion"] == "1.6"
    assert bill["metadata"]["component"] == {"bom-ref": "cosilo-site", "name": "cosilo-site", "type": "application", "version": "0.1.0"}
    assert {entry["name"]: entry["hashes"] for entry in bill["components"]} == {
        name: [{"alg": "SHA-256", "content": digest}] for name, digest in digests.items()
    }
    assert [entry["licenses"][0]["license"]["id"] for entry in bill["components"]] == ["MIT", "MIT"]
    references = {entry["name"]: entry["bom-ref"] for entry in bill["components"]}
    needs = {entry["ref"]: entry.get("dependsOn", []) for entry in bill["dependencies"]}
    assert needs["cosilo-site"] == [references["upper_part"]]
    assert needs[references["upper_part"]] == [references["Lower.Part"]]
    assert write_bill(wheels, tmp_path / "second.json").returncode == 0
    assert (tmp_path / "second.json").read_bytes() == (tmp_path / "first.json").read_bytes()


def test_a_folder_without_wheels_and_a_wheel_under_another_name_are_refused(tmp_path: Path) -> None:
    (wheels := tmp_path / "wheels").mkdir()
    assert f"error: sbom: {wheels} holds no wheels" in write_bill(wheels, tmp_path / "bill.json").stderr
    make_wheel(wheels, "honest", "1.0", filed_as="other")
    done = write_bill(wheels, tmp_path / "bill.json")
    assert (done.returncode, "('honest', '1.0'), ('other', '1.0')" in done.stderr) == (1, True)
    assert not (tmp_path / "bill.json").exists()
