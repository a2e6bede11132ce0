#!/bin/sh
# The test suite under the oldest and the newest versions that requirements.txt allows, each in a
# virtual environment of its own: `sh tests/versions.sh`, or one pair: `sh tests/versions.sh oldest`.
# PYTHON_OLDEST and PYTHON_NEWEST name the interpreters. A pair takes some 6 GB while it is tested.
set -u
cd "$(dirname "$0")/.."
status=0
for pair in ${1:-oldest newest}; do
    case $pair in
        oldest) python=${PYTHON_OLDEST:-python3.10}
                packages="torch==2.6.0 torchvision==0.21.0 pillow==10.1.0" ;;
        newest) python=${PYTHON_NEWEST:-python3}
                packages="--upgrade torch torchvision pillow" ;;
    esac
    venv=$(mktemp -d)
    # Only the packages named are pinned; pip takes the newest of the others that go with them.
    "$python" -m venv "$venv" &&
        "$venv/bin/pip" install --quiet $packages -r requirements.txt pytest &&
        "$venv/bin/python" -m pytest tests -q || status=1
    "$venv/bin/python" -c "import platform, torch, torchvision, numpy, PIL
print('$pair:', 'Python', platform.python_version(), 'torch', torch.__version__, 'torchvision',
      torchvision.__version__, 'numpy', numpy.__version__, 'Pillow', PIL.__version__)" || status=1
    rm -rf "$venv"
done
exit $status
