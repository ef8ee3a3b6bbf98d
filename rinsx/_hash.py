"""Hashes of files."""

import hashlib
import os


def hash_file(path: str | os.PathLike) -> str:
    """The SHA-256 of what a file holds."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
