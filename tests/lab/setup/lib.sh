# What every step of the set-up stands on: progress, logs, locks and the cache. Sourced, never run.

setup_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/busway-lab
mkdir -p "$cache/logs"

say() { printf 'lab: %s\n' "$*" >&2; }

die() {
    printf 'lab: error: %s\n' "$*" >&2
    exit 1
}

# as_root COMMAND…: only what changes the machine, or needs chroot, asks for it.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "'$1' needs root, and there is no sudo: run scripts/lab setup once as root"
    fi
}

# logged NAME COMMAND…: runs quietly; on failure shows why, and stops.
logged() {
    local log=$cache/logs/$1.log
    shift
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 25 "$log" >&2
        die "'$*' failed; the whole log is $log"
    fi
}

# key FILE_OR_WORD…: twelve hexadecimal digits that name what was made from these.
key() {
    local each
    for each in "$@"; do
        if [ -f "$each" ]; then cat "$each"; else printf '%s\n' "$each"; fi
    done | sha256sum | cut -c1-12
}

# made DIR WHAT FUNCTION: makes DIR by `FUNCTION DIR.partial`, once. A half-made folder never has the final name.
made() {
    local dir=$1 what=$2 function=$3 began=$SECONDS
    [ -d "$dir" ] && return
    install_prerequisites
    say "making $what (its logs are in $cache/logs)"
    as_root rm -rf "$dir.partial"
    mkdir -p "$dir.partial"
    "$function" "$dir.partial"
    mv "$dir.partial" "$dir"
    say "made $what in $((SECONDS - began)) s"
    [ -z "${BUSWAY_LAB_TIMES-}" ] || printf 'set-up: %s\t%s\n' "$what" $((SECONDS - began)) >>"$BUSWAY_LAB_TIMES"
}
