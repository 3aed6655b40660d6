#!/usr/bin/env bash
# What `make build` needs from the system: venv, Python.h, gcc, binutils. As root it installs what is missing,
# otherwise it prints the one line that does.
#
#     tools/setup_check.sh [PYTHON]
set -euo pipefail
python=${1:-python3}

if command -v "$python" >/dev/null && ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$python is $("$python" -V); Python 3.11 or later is needed (make SYSTEM_PYTHON=/path/to/python3)" >&2
    exit 1
fi

missing=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null || true)/Python.h
[ -f "$header" ] || missing+=(python3-dev)
command -v gcc >/dev/null || missing+=(gcc)
command -v as >/dev/null || missing+=(binutils)
[ -f /usr/include/stdio.h ] || missing+=(libc6-dev)
[ ${#missing[@]} -eq 0 ] && exit 0

install="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    echo "Installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    bash -c "set -e; ${install/update/update -qq}" >/dev/null
else
    echo "Missing: ${missing[*]}. Install them with:" >&2
    echo "    sudo sh -c '$install'" >&2
    exit 1
fi
