#!/bin/sh
# Installs the load generators that `make bench` runs beside ours, each in an environment of its
# own, because each pins versions of its own: AIPerf and GuideLLM, in the versions that the figures
# of the README were measured with. vLLM's own benchmark comes with vLLM (`make real-parts`).
#
# They go to $SERVEFIT_PEERS (default: servefit/peers in the user's cache directory). What is there
# in the pinned version is left alone, so running it again costs nothing.
set -eu

AIPERF='aiperf==0.13.0'
GUIDELLM='guidellm==0.8.1'

peers=${SERVEFIT_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/servefit/peers}
mkdir -p "$peers"
log=$peers/install.log

# The oldest Python first: wheels of large packages appear late for a new one.
find_python() {
    for python in python3.11 python3.12 python3.13 python3; do
        if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            echo "$python"
            return
        fi
    done
    echo "peers.sh: no Python of at least 3.11 with venv and ensurepip is on the path" >&2
    exit 1
}

# install NAME REQUIREMENT: an environment $peers/NAME that holds it; the stamp is written last.
install() {
    venv=$peers/$1
    if [ "$(cat "$venv/.servefit-stamp" 2>/dev/null)" = "$2" ]; then
        echo "$1: $2 is there"
        return
    fi
    echo "$1: installing $2 into $venv (output in $log)"
    if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
        "$(find_python)" -m venv --clear "$venv"
    fi
    if ! "$venv/bin/python" -m pip install --no-input "$2" >>"$log" 2>&1; then
        echo "peers.sh: $2 could not be installed; the end of $log:" >&2
        grep -v '^WARNING' "$log" | tail -n 15 >&2
        exit 1
    fi
    echo "$2" >"$venv/.servefit-stamp"
}

install aiperf "$AIPERF"
install guidellm "$GUIDELLM"
