# Runs a VMM for a guest run, in the emulated host. Arguments: the run's folder; `dies` where the guest is to crash, else
# `lives`; then the command.
# Each line of the VMM's standard output goes on with the time in front of it. At a guest's
# `@@mark NAME` the VMM's counters are written to FOLDER/mark.NAME. The exit status is the VMM's.
folder=$1
end=$2
shift 2
pipe=/run/lab/console.$$
calls=/sys/kernel/tracing/events/raw_syscalls/sys_enter/hist
mkfifo "$pipe" "$pipe.watch"
trap 'rm -f "$pipe" "$pipe.watch"' EXIT

snapshot() { # MARK
    local mark=$1 file value task stat
    printf 'at %s\n' "$EPOCHREALTIME"
    for file in /sys/kernel/debug/kvm/"$pid"-*/*; do
        [ -f "$file" ] && read -r value <"$file" && printf 'kvm %s %s\n' "${file##*/}" "$value"
    done
    for task in /proc/"$pid"/task/*; do
        # proc(5): after the name in parentheses, utime and stime are the 12th and 13th words.
        read -r stat <"$task/stat" || continue
        set -- ${stat##*) }
        stat=${stat#*(}
        printf 'thread %s %s %s %s\n' "${task##*/}" "${12}" "${13}" "${stat%)*}"
    done
    awk '/vfio-msi/ { for (at = 2; $at ~ /^[0-9]+$/; at++) sum += $at } END { print "interrupts", sum + 0 }' \
        /proc/interrupts
    # Where the host counts system calls by thread: the sum of this VMM's. Lines are `{ common_pid: N } hitcount: N`.
    [ ! -r "$calls" ] || awk -v tasks="$(cd "/proc/$pid/task" && echo *)" '
        BEGIN { split(tasks, each); for (at in each) ours[each[at]] = 1 }
        /^# trigger/ { counts = 1 }
        /^[{]/ { gsub(/[^0-9]+/, " "); if ($1 in ours) sum += $2 }
        END { if (counts) print "calls", sum + 0 }' "$calls"
    # The map of a whole guest takes a second under emulation: only where a mark asks for memory.
    case $mark in memory*) sed 's/^/map /' "/proc/$pid/smaps" ;; esac
}

# The emulator can leave a vCPU without any further interrupt, which then leaves the guest over and over: docs/lab.md.
# Half a minute of that ends the VMM, and says why.
watch_for_standstill() {
    local counters=/sys/kernel/debug/kvm/$pid exits injections last_exits=0 last_injections=0 periods=0
    # Nobody writes to the pipe, so this looks every ten seconds.
    while ! read -r -t 10; do
        read -r exits <"$(echo "$counters"-*/exits)" && read -r injections <"$(echo "$counters"-*/irq_injections)" || continue
        periods=$((injections == last_injections && exits - last_exits > 300 ? periods + 1 : 0))
        last_exits=$exits last_injections=$injections
        if [ "$periods" = 3 ]; then
            echo "lab: the guest stands still: $exits exits, and no interrupt for 30 s" >>"$folder/vmm.stderr"
            kill -KILL "$pid"
            return
        fi
    done <>"$pipe.watch" 2>/dev/null
}

began=$EPOCHREALTIME
"$@" </dev/null >"$pipe" 2>"$folder/vmm.stderr" &
pid=$!
echo "$pid" >"$folder/vmm.pid"
printf '%s @@exec\n' "$began"
# One that has crashed stands still by right.
watcher=
if [ "$end" = lives ]; then
    watch_for_standstill &
    watcher=$!
fi
while IFS= read -r line || [ -n "$line" ]; do
    line=${line%$'\r'}
    printf '%s %s\n' "$EPOCHREALTIME" "$line"
    case $line in
    *'@@mark '*) snapshot "${line##*@@mark }" >"$folder/mark.${line##*@@mark }" ;;
    esac
done <"$pipe"
wait "$pid"
status=$?
[ -z "$watcher" ] || kill "$watcher" 2>/dev/null
exit "$status"
