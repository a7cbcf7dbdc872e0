"""A file system of local folders for Ray, which makes whatever folder it writes to: below one that has to exist."""

from __future__ import annotations

import os
from typing import Any

from fsspec.implementations.local import LocalFileSystem


class FilesBelow(LocalFileSystem):  # type: ignore[misc]
    """Local files; no folder is created once `root` is gone, because it was deleted, or its disk unmounted."""

    protocol = "below"

    def __init__(self, root: str, **options: Any) -> None:
        super().__init__(root=root, **options)
        self.root = root

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        if not os.path.isdir(self.root):
            raise FileNotFoundError(f"{self.root}: is gone")
        super().makedirs(path, exist_ok=exist_ok)
