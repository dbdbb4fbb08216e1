"""Names the Debian packages that the training text comes from, and fetches them.

Never reads a package that is not in `SOURCES`, and installs nothing: it downloads and unpacks.
"""

import logging
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import extract

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """One Debian package and the way its text is read.

    `version` is what the shipped checkpoint was trained on; another version gives other text.
    """

    name: str
    package: str
    version: str
    licence: str
    read: Callable[[Path], Iterator[str]]


SOURCES = (
    Source(
        name="bible",
        package="sword-text-web",
        version="426.0-1",
        licence="public domain",
        read=extract.bible_chapters,
    ),
    Source(
        name="austen",
        package="r-cran-janeaustenr",
        version="1.0.0-1",
        licence="public domain text in an MIT package",
        read=extract.austen_chapters,
    ),
    Source(
        name="devil",
        package="dict-devil",
        version="1.0-13.1",
        licence="public domain",
        read=extract.devil_entries,
    ),
    Source(
        name="jargon",
        package="jargon-text",
        version="4.4.7-4.1",
        licence="public domain",
        read=extract.jargon_entries,
    ),
    Source(
        name="sqlite",
        package="sqlite3-doc",
        version="3.40.1-2+deb12u2",
        licence="public domain",
        read=extract.sqlite_pages,
    ),
    Source(
        name="rust",
        package="rust-doc",
        version="1.63.0+dfsg1-2",
        licence="MIT or Apache-2.0",
        read=extract.rust_book_pages,
    ),
    Source(
        name="postgres",
        package="postgresql-doc-15",
        version="15.20-0+deb12u1",
        licence="PostgreSQL",
        read=extract.postgres_pages,
    ),
)


def fetch(source: Source, cache: Path) -> Path:
    """Downloads one package with apt, unpacks it below `cache` and returns the unpacked root.

    The pinned version comes first. Mirrors keep only the newest version of a package, so what they
    have instead is accepted with a warning: the text is nearly the same, the checkpoint is not.
    """
    root = cache / source.package
    if root.is_dir():
        return root
    archives = cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    pinned = f"{source.package}={source.version}"
    if not _download(pinned, archives):
        log.warning("%s is not on the mirror; taking the version that is", pinned)
        if not _download(source.package, archives):
            raise SystemExit(
                f"apt-get could not download {source.package}. The training text comes from Debian "
                f"12 (main). Run there after `apt-get update`, or unpack the package to {root}"
            )
    (archive,) = archives.glob(f"{source.package}_*.deb")
    subprocess.run(["dpkg-deb", "--extract", str(archive), str(root)], check=True)
    return root


def _download(package: str, archives: Path) -> bool:
    return (
        subprocess.run(["apt-get", "download", package], cwd=archives, check=False).returncode == 0
    )
