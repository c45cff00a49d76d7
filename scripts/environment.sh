# Sourced by the scripts beside it: environment FOLDER NAME REQUIREMENT... makes a
# virtual environment of Python 3.11 or later (PYTHON names another one) and
# installs what is required there, once for each setup.py: a stamp NAME holds it.
environment() {
  local folder="$1" stamp="$1/$2" python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$(basename "$0"): Python 3.11 or later is required, $python is" \
      "$("$python" --version 2>&1); name another with PYTHON=..." >&2
    exit 2
  fi
  if [ ! -x "$folder/bin/python" ]; then
    echo "Making $folder ..."
    "$python" -m venv "$folder"
  fi
  if ! cmp -s setup.py "$stamp"; then
    echo "Installing ${*:3} in $folder (some minutes, once) ..."
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
      --editable "${@:3}"
    cp setup.py "$stamp"
  fi
}
