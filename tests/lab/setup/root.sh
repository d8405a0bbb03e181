# The Debian 13 root. It serves twice: QEMU runs from it, and it is the emulated host's own file system. Sourced.

root_suite=trixie
root_packages=(
    busybox-static ca-certificates curl e2fsprogs erofs-utils ethtool fio iperf3 iproute2 kmod lvm2 mdadm nvme-cli pciutils
    procps psmisc python3-minimal socat strace tcpdump udev xxd
)
root_backports=(qemu-system-x86 qemu-utils)

# What a power cut may cost is made anew, so apt need not wait for the disk.
quickly=(-o DPkg::Options::=--force-unsafe-io)

# The mirror that this machine's own apt uses for Debian; nothing on a machine that is not Debian.
debian_mirror() {
    if [ -n "${BUSWAY_DEBIAN_MIRROR:-}" ]; then
        printf '%s\n' "$BUSWAY_DEBIAN_MIRROR"
    else
        apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' \
            'Component: main' | head -n 1
    fi
}

# in_root DIR COMMAND…: by chroot, with /proc and /dev, in a mount namespace of its own so that nothing stays mounted.
in_root() {
    local dir=$1
    shift
    as_root unshare --mount --propagation private sh -ec '
        root=$1; shift
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount -t tmpfs tmpfs "$root/run"
        cp /etc/resolv.conf "$root/run/resolv.conf"
        touch "$root/etc/resolv.conf"
        mount --bind "$root/run/resolv.conf" "$(realpath "$root/etc/resolv.conf")"
        exec chroot "$root" env DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/sbin:/usr/bin "$@"
    ' sh "$dir" "$@"
}

make_root() {
    local dir=$1 mirror
    mirror=$(debian_mirror)
    logged debootstrap as_root debootstrap --variant=minbase --include=ca-certificates "$root_suite" "$dir" ${mirror:+"$mirror"}
    mirror=$(awk '$1 == "deb" { print $2; exit }' "$dir/etc/apt/sources.list")
    as_root tee "$dir/etc/apt/sources.list" >/dev/null <<END
deb $mirror $root_suite main
deb $mirror $root_suite-backports main
END
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$dir/usr/sbin/policy-rc.d" >/dev/null
    as_root chmod +x "$dir/usr/sbin/policy-rc.d"
    logged root-update in_root "$dir" apt-get update
    logged root-tools in_root "$dir" apt-get install -y --no-install-recommends "${quickly[@]}" "${root_packages[@]}"
    logged root-qemu in_root "$dir" apt-get install -y --no-install-recommends "${quickly[@]}" -t "$root_suite-backports" "${root_backports[@]}"
    in_root "$dir" sh -c '
        apt-get clean
        newest() { # NAME [SUITE]: the release of the kernel that linux-image-amd64 stands for, and its version
            suite=-oAPT::Default-Release=$2
            release=$(apt-cache "$suite" depends linux-image-amd64 | sed -n "s/^ *Depends: linux-image-//p")
            version=$(apt-cache "$suite" show --no-all-versions "linux-headers-$release" | sed -n "s/^Version: //p")
            printf "%s_release=%s\n%s_version=%s\n" "$1" "$release" "$1" "$version"
        }
        newest stock "$0"
        newest backports "$0-backports"
    ' "$root_suite" | as_root tee "$dir/etc/lab-versions" >/dev/null
    as_root chmod 755 "$dir"
}

# apt_of_root COMMAND…: this machine's apt with the root's lists; it fetches into the current folder, and needs no root.
apt_of_root() {
    apt-get -o "Dir=$root" -o APT::Sandbox::User="$(id -un)" -o APT::Architecture=amd64 "$@"
}

root=$cache/root-$(key "$setup_dir/root.sh")
