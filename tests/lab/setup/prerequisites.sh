# What this machine needs to make the lab: on Debian and Ubuntu, by apt. Sourced.

# COMMAND:PACKAGE, or a file's path in place of the command.
prerequisites=(
    debootstrap:debootstrap /usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring
    cpio:cpio modprobe:kmod xz:xz-utils zstd:zstd
)

install_prerequisites() {
    local each missing=()
    for each in "${prerequisites[@]}"; do
        case $each in
        /*) [ -e "${each%:*}" ] ;;
        *) PATH=$PATH:/usr/sbin:/sbin command -v "${each%:*}" >/dev/null ;;
        esac || missing+=("${each#*:}")
    done
    [ ${#missing[@]} = 0 ] && return
    command -v apt-get >/dev/null || die "install the equivalents of: ${missing[*]}"
    say "installing ${missing[*]}"
    logged apt-update as_root apt-get update
    logged apt-install as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
}
