"""Writes the software bill of materials of one of Cosilo's images as CycloneDX JSON: its Python packages and its Debian packages.

The Python packages as tools/sbom.py has them (names, versions, licences, who needs whom), from the metadata in the image's environment; the
Debian packages by name and version, as dpkg in the image lists them. What is compiled into a wheel (OpenBLAS in numpy's) is a part of that
component and not one of its own. Owns how an image is asked. Must not know how images are made.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from tools.sbom import SbomError, name_it, of_environment, validated

SITE_PACKAGES: Final = "/opt/cosilo/lib/python3*/site-packages"
TIMEOUT_S: Final = 300.0


def main() -> int:
    """`python -m tools.sbom_image IMAGE --name NAME --out FILE`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", help="one that the engine at DOCKER_HOST has")
    parser.add_argument("--name", required=True, help="what it is the bill of, as cosilo-site-image")
    parser.add_argument("--release", default="0.1.0", help="its version")
    parser.add_argument("--out", type=Path, required=True, help="the file that is written")
    given = parser.parse_args()
    try:
        bill = of_image(given.image)
        name_it(bill, given.name, given.release)
        text = validated(bill)
    except (SbomError, OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        print(f"error: sbom: {error}", file=sys.stderr)
        return 1
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")
    debian = sum(component.get("purl", "").startswith("pkg:deb/") for component in bill["components"])
    print(f"{given.out}: {len(bill['components']) - debian} Python packages and {debian} Debian packages")
    return 0


def of_image(image: str) -> dict[str, Any]:
    """A bill of what an image holds. Raises SbomError where the image cannot be asked."""
    metadata = _ask(image, f"cd {SITE_PACKAGES} && tar -cf - *.dist-info")
    with tempfile.TemporaryDirectory(prefix="cosilo-sbom-") as scratch:
        venv.create(Path(scratch), with_pip=False, symlinks=True)
        packages = sysconfig.get_path("purelib", "venv", {"base": scratch, "platbase": scratch})
        with tarfile.open(fileobj=io.BytesIO(metadata)) as archive:
            archive.extractall(packages, filter="data")
        bill = of_environment(Path(scratch) / "bin" / "python")
    listed = _ask(image, "dpkg-query --show --showformat '${Package}\\t${Version}\\t${Architecture}\\n'").decode()
    bill["components"] += [_debian(*line.split("\t")) for line in sorted(listed.splitlines())]
    return bill


def _debian(name: str, version: str, architecture: str) -> dict[str, Any]:
    """One package; its purl by the purl specification's `deb` type."""
    purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _ask(image: str, script: str) -> bytes:
    command = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "sh", image, "-ec", script]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise SbomError(f"{image}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
