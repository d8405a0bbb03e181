# What the emulated host's processes are doing, kernel threads left out: a line for each, one for each of its threads if
# it has several, then the kernel's last messages. By builtins, because starting programs is slow under emulation.

task() { # FOLDER WORDS: how a thread waits, and the kernel's functions that it is in, the innermost first
    local stat fields name wchan call frame stack=
    read -r stat <"$1/stat" || return
    name=${stat#*(}
    name=${name%)*}
    # proc(5): from the third on, the state; the 14th and 15th are utime and stime, in hundredths of a second.
    fields=(${stat##*) })
    # The file has no end of line.
    read -r wchan <"$1/wchan"
    read -r call _ <"$1/syscall"
    while read -r _ frame; do
        frame=${frame%%+*}
        [ "$frame" != do_syscall_64 ] || break
        stack+=" < $frame"
    done <"$1/stack"
    printf '%s %s %s, ran %s ticks, wchan %s, syscall %s%s%s\n' "${1##*/}" "${fields[0]}" "$name" \
        $((fields[11] + fields[12])) "${wchan:-0}" "${call:-unknown}" "$2" "${stack:+: ${stack# < }}"
}

guests() { # what KVM has counted for each of its guests: one that stands still has no more exits
    local guest counter value
    for guest in /sys/kernel/debug/kvm/[0-9]*; do
        [ -d "$guest" ] || continue
        printf 'KVM, process %s:' "${guest##*/}"
        for counter in exits halt_exits io_exits mmio_exits irq_injections signal_exits; do
            read -r value <"$guest/$counter" && printf ' %s %s' "$counter" "$value"
        done
        echo
    done
}

read -r up _ </proc/uptime
read -r load </proc/loadavg
printf 'up %s s, load %s\n' "$up" "$load"
guests
for process in /proc/[0-9]*; do
    [ "$process" != "/proc/$$" ] && read -r stat <"$process/stat" || continue
    # proc(5): after the name come the state, ppid, pgrp, session, tty_nr, tpgid and flags, of which PF_KTHREAD
    # (linux/sched.h) is 0x00200000.
    set -- ${stat##*) }
    [ $(($7 & 0x00200000)) = 0 ] || continue
    mapfile -d '' -t words <"$process/cmdline"
    command=${words[*]}
    # A host that has just booted has dozens of udev's workers that wait for work.
    read -r wchan <"$process/wchan"
    [ "$command $wchan" != "(udev-worker) do_epoll_wait" ] || continue
    task "$process" ", session $4, ${command:0:70}"
    threads=("$process"/task/*)
    [ ${#threads[@]} -gt 1 ] || continue
    for thread in "${threads[@]}"; do
        printf '  '
        task "$thread" ''
    done
done
guests
echo "the kernel's last messages:"
dmesg | tail -n 30
