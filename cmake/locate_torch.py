"""Print where the installed torch is, without importing it.

Looks at ``$NAMM_TORCH_DIR`` (the folder ``.../site-packages/torch``), then at ``sys.path``, then
at this interpreter's site-packages, then at those of ``$VIRTUAL_ENV``: pip's isolated build keeps
the interpreter of the environment that asked for the build. Prints ``folder;version;cuda``.
"""

import glob
import os
import re
import sys
import sysconfig


def candidates():
    if os.environ.get("NAMM_TORCH_DIR"):
        yield os.environ["NAMM_TORCH_DIR"]
        return
    folders = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    if os.environ.get("VIRTUAL_ENV"):
        folders += glob.glob(
            os.path.join(os.environ["VIRTUAL_ENV"], "lib", "python3*", "site-packages")
        )
    for folder in folders:
        yield os.path.join(folder, "torch")


def main():
    for folder in candidates():
        version_file = os.path.join(folder, "version.py")
        header = os.path.join(folder, "include", "torch", "csrc", "stable", "library.h")
        if os.path.isfile(version_file) and os.path.isfile(header):
            with open(version_file, encoding="utf-8") as file:
                text = file.read()
            version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
            cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
            if version:
                release = re.match(r"\d+(\.\d+)*", version.group(1)).group(0)
                print(f"{folder};{release};{cuda.group(1) if cuda else ''}")
                return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
