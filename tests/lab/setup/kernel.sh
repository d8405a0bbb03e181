# Building a kernel out of a linux-source package: tinyconfig, and beyond it one of the lab's configurations. Sourced,
# after root.sh.

# build_kernel NAME PACKAGE VERSION CONFIG MINUTES TARGET…: in a tree that is the current folder afterwards.
build_kernel() {
    local name=$1 package=$2 version=$3 config=$4 minutes=$5 tree=$cache/build-$1 missing
    shift 5
    rm -rf "$tree"
    mkdir -p "$tree/package" "$tree/linux"
    cd "$tree/package"
    logged "$name-fetch" apt_of_root download "$package=$version"
    dpkg-deb --fsys-tarfile ./*.deb | tar -xO --wildcards './usr/src/linux-source-*.tar.xz' |
        tar -xJ -C ../linux --strip-components=1
    cd ../linux
    logged "$name-config" make ARCH=x86_64 tinyconfig
    cat "$config" >>.config
    logged "$name-config" make ARCH=x86_64 olddefconfig
    missing=$(grep '^CONFIG_.*=[^n]' "$config" | grep -vxFf .config || true)
    [ -z "$missing" ] || die "the $name kernel's configuration does not keep: $missing"
    say "building the $name kernel takes about $minutes minutes on two cores, this once"
    progress "$cache/logs/$name-build.log" &
    local watcher=$!
    logged "$name-build" nice make ARCH=x86_64 -j"$(nproc)" "$@"
    kill "$watcher"
    wait "$watcher" 2>/dev/null || true
}

# progress LOG: how far a build is, every half minute, for as long as this shell lives.
progress() {
    local shell=$$
    while sleep 30 && kill -0 "$shell" 2>/dev/null; do
        say "… $(grep -c '^  [A-Z]' "$1" 2>/dev/null || true) steps done, at $(tail -n 1 "$1" 2>/dev/null | awk '{ print $2 }')"
    done
}
