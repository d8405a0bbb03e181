//! What a person needs of the long texts that tell how a host stands: QEMU's registers, proc(5)'s threads, and the
//! stacks that the kernel writes on its console.

use std::fmt;

/// An emulated processor, as the monitor's `info registers` shows it. Numbers are as there, in hexadecimal.
///
/// Whether it is the host's code that runs, or that of a guest of the host's KVM, is not shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Processor<'text> {
    pub(crate) number: &'text str,
    pub(crate) rip: &'text str,
    rsp: &'text str,
    rflags: &'text str,
    cpl: &'text str,
    cr3: &'text str,
    halted: bool,
}

impl<'text> Processor<'text> {
    /// All processors of the text that `info registers -a` gives.
    pub(crate) fn parse_all(text: &'text str) -> Vec<Self> {
        text.split("CPU#").skip(1).map(Self::parse).collect()
    }

    fn parse(text: &'text str) -> Self {
        // Outside of 64-bit mode the names begin with an E.
        let field = |name: &str| {
            let mut words = text.split_ascii_whitespace();
            words.find_map(|word| {
                let (key, value) = word.split_once('=')?;
                (key == name || key == name.replacen('R', "E", 1)).then_some(value)
            })
        };
        let known = |name| field(name).unwrap_or("unknown");
        Self {
            number: text.split_ascii_whitespace().next().unwrap_or("unknown"),
            rip: known("RIP"),
            rsp: known("RSP"),
            rflags: known("RFL"),
            cpl: known("CPL"),
            cr3: known("CR3"),
            halted: field("HLT") == Some("1"),
        }
    }
}

impl fmt::Display for Processor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // RFLAGS.IF, AMD APM volume 2 §3.1.6
        const IF: u64 = 1 << 9;
        let Self {
            number,
            rip,
            rsp,
            rflags,
            cpl,
            cr3,
            halted,
        } = self;
        let state = if *halted { "halted" } else { "runs" };
        let interrupts = match u64::from_str_radix(rflags, 16) {
            Ok(flags) if flags & IF == 0 => ", interrupts disabled",
            Ok(_) => ", interrupts enabled",
            Err(_) => "",
        };
        write!(
            f,
            "CPU {number} {state}{interrupts}: RIP {rip} RSP {rsp} RFLAGS {rflags} CPL {cpl} CR3 {cr3}"
        )
    }
}

/// A thread, as proc(5)'s `stat` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Task {
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) state: char,
    /// Hundredths of a second on a processor: `utime` and `stime`.
    pub(crate) ticks: u64,
}

impl Task {
    pub(crate) fn parse(stat: &str) -> Option<Self> {
        let (start, rest) = stat.rsplit_once(')')?;
        let (id, name) = start.split_once('(')?;
        let mut words = rest.split_ascii_whitespace();
        let state = words.next()?.chars().next()?;
        // utime is the file's 14th word, the state its third.
        let mut times = words.skip(10);
        let mut time = || times.next()?.parse::<u64>().ok();
        Some(Self {
            id: id.trim().parse().ok()?,
            name: name.to_owned(),
            state,
            ticks: time()? + time()?,
        })
    }
}

/// How many functions of a stack are shown.
const FRAMES: usize = 12;

/// Where a system call enters the kernel: what follows in a stack is the same for all.
const ENTRY: &str = "do_syscall_64";

/// The stacks of processors and of user processes, a line each, of what the kernel wrote on its console for SysRq's `l`
/// and `t` or for a panic.
pub(crate) fn stacks(console: &str) -> Vec<String> {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    let mut wanted = false;
    for line in console.lines() {
        // "[   15.395357] NMI backtrace for cpu 1"
        let Some((_, text)) = line.split_once("] ") else {
            continue;
        };
        if let Some(number) = text.strip_prefix("NMI backtrace for cpu ") {
            wanted = true;
            found.push((format!("CPU {number}"), Vec::new()));
        } else if text.starts_with("Kernel panic") {
            wanted = true;
            found.push((text.to_owned(), Vec::new()));
        } else if let Some(task) = text.strip_prefix("task:") {
            let task = user_task(task);
            wanted = task.is_some();
            found.extend(task.map(|name| (name, Vec::new())));
        } else if text.starts_with("Sched Debug") || text.starts_with("Showing") {
            wanted = false;
        } else if let (true, Some((name, frames))) = (wanted, found.last_mut()) {
            if let Some((_, process)) = text.split_once(" Comm: ") {
                let process = process.split(" Not tainted").next().unwrap_or_default();
                let process = process.split(" Tainted").next().unwrap_or_default();
                *name = format!("{name}, {process}");
            } else if let Some(rip) = text.strip_prefix("RIP: ") {
                // What the processor does to answer the key is not what it was doing.
                if frames.iter().any(|frame| frame.contains("sysrq")) {
                    frames.clear();
                }
                let (segment, place) = rip.split_once(':').unwrap_or(("", rip));
                let place = place.split('+').next().unwrap_or_default();
                // __USER_CS, linux/arch/x86/include/asm/segment.h
                let user = if segment == "0033" { "user code " } else { "" };
                frames.push(format!("{user}{place}"));
            } else if let Some(frame) = frame(text) {
                frames.push(frame.to_owned());
            }
        }
    }
    let line = |(name, mut frames): (String, Vec<String>)| {
        let entry = frames.iter().position(|frame| frame == ENTRY);
        frames.truncate(entry.unwrap_or(frames.len()));
        // The innermost functions of every thread that waits.
        frames.retain(|frame| !["__schedule", "schedule"].contains(&frame.as_str()));
        frames.truncate(FRAMES);
        format!("{name}: {}", frames.join(" < "))
    };
    found.into_iter().map(line).collect()
}

/// The name of what follows a `task:`, unless it is a kernel thread, all of which are kthreadd's children.
fn user_task(text: &str) -> Option<String> {
    let (name, rest) = text.split_once(" state:")?;
    let field = |key| {
        let mut words = rest.split_ascii_whitespace();
        words.find_map(|word| word.strip_prefix(key))
    };
    let pid = field("pid:")?;
    if pid == "2" || field("ppid:") == Some("2") {
        return None;
    }
    Some(format!("{pid} {} {}", rest.get(..1)?, name.trim_end()))
}

/// The function of a line of a call trace; what the kernel marks as uncertain is none.
fn frame(text: &str) -> Option<&str> {
    let (function, _) = text.strip_prefix(' ')?.split_once("+0x")?;
    (!function.contains(' ')).then_some(function)
}

/// The first lines of a text, none of them very long, and how many were left out.
pub(crate) fn first_lines(text: &str, limit: usize) -> String {
    let mut lines: Vec<String> = text
        .lines()
        .take(limit)
        .map(|line| line.chars().take(240).collect())
        .collect();
    let more = text.lines().count().saturating_sub(limit);
    if more > 0 {
        lines.push(format!("... and {more} lines more"));
    }
    lines.join("\n")
}

/// The last lines of a text.
pub(crate) fn last_lines(text: &str, limit: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(limit)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_read_in_and_out_of_64_bit_mode() {
        let text = "\r\nCPU#0\r\nRSI=0000000000000002 RSP=ffffcb444005bdf8\r\n\
            RIP=ffffffffb773e69a RFL=00000046 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0\r\n\
            CR0=80050033 CR2=0000556fed5a4e58 CR3=0000000001d78000 CR4=003506f0\r\n\r\nCPU#1\r\n\
            ESI=00000000 ESP=00006d8c\r\nEIP=000ef135 EFL=00000206 [-----P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r\n\
            CR0=00000011 CR2=00000000 CR3=00000000 CR4=00000000\r\n";
        let shown: Vec<String> = Processor::parse_all(text)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            shown,
            [
                "CPU 0 runs, interrupts disabled: RIP ffffffffb773e69a RSP ffffcb444005bdf8 RFLAGS 00000046 \
                 CPL 0 CR3 0000000001d78000",
                "CPU 1 halted, interrupts enabled: RIP 000ef135 RSP 00006d8c RFLAGS 00000206 CPL 0 CR3 00000000",
            ]
        );
        assert!(Processor::parse_all("unknown command").is_empty());
    }

    #[test]
    fn a_thread_may_have_any_name() {
        let stat =
            "12122 (CPU 0) (TCG) R 12078 12077 8070 0 -1 138412224 9226 0 0 0 778 70 0 0 39 19 8";
        let task = Task::parse(stat).expect("a thread");
        assert_eq!((task.id, task.state, task.ticks), (12122, 'R', 848));
        assert_eq!(task.name, "CPU 0) (TCG");
        assert_eq!(Task::parse("12122 (CPU 0/TCG) R 12078"), None);
    }

    #[test]
    fn stacks_of_processors_and_user_processes_are_a_line_each() {
        let console = "\
[   15.394852] sysrq: Show backtrace of all active CPUs
[   15.395357] NMI backtrace for cpu 1
[   15.395969] CPU: 1 UID: 0 PID: 0 Comm: swapper/1 Not tainted 6.12.117+deb13-amd64 #1  Debian 6.12.117-1
[   15.396345] Call Trace:
[   15.397104]  <IRQ>
[   15.397243]  dump_stack_lvl+0x5d/0x80
[   15.397828]  ? __pfx_nmi_raise_cpu_backtrace+0x10/0x10
[   15.397860]  __handle_sysrq.cold+0x9c/0xe6
[   15.398145]  </IRQ>
[   15.398163]  asm_common_interrupt+0x26/0x40
[   15.398292] RIP: 0010:pv_native_safe_halt+0xf/0x20
[   15.398435] Code: 09 c3 cc
[   15.398965] RAX: 0000000000000001 RBX: 0000000000000000 RCX: 0000000000000001
[   15.399093]  default_idle+0x9/0x20
[   15.399138]  start_secondary+0x11e/0x140
[   15.399290] Sending NMI from CPU 1 to CPUs 0:
[   15.405538] NMI backtrace for cpu 0
[   15.408841] CPU: 0 UID: 0 PID: 77 Comm: busway Not tainted 6.12.117+deb13-amd64 #1  Debian 6.12.117-1
[   15.409328] RIP: 0033:0x7f2ed29f40ac
[   16.000000] sysrq: Show State
[   16.000001] task:lab-agent       state:S stack:0     pid:1     tgid:1     ppid:0      flags:0x00000002
[   16.000002] Call Trace:
[   16.000003]  <TASK>
[   16.000004]  __schedule+0x505/0xbf0
[   16.000005]  n_tty_read+0x3c3/0x6c0
[   16.000005]  do_syscall_64+0x82/0x190
[   16.000005]  entry_SYSCALL_64_after_hwframe+0x76/0x7e
[   16.000005] RIP: 0033:0x7f93126da3a7
[   16.000006] task:kthreadd        state:S stack:0     pid:2     tgid:2     ppid:0      flags:0x00004000
[   16.000007]  kthreadd+0x2c0/0x310
[   16.000008] task:kworker/0:0     state:I stack:0     pid:9     tgid:9     ppid:2      flags:0x00004000
[   16.000009]  worker_thread+0x2c0/0x310
[   16.000010] task:CPU 0/KVM       state:D stack:0     pid:93    tgid:90    ppid:80     flags:0x00004000
[   16.000011]  kvm_vcpu_block+0x5a/0xb0 [kvm]
[   16.000012] Showing busy workqueues and worker pools:
[   16.000013]  nobody+0x0/0x1
";
        assert_eq!(
            stacks(console),
            [
                "CPU 1, swapper/1: pv_native_safe_halt < default_idle < start_secondary",
                "CPU 0, busway: user code 0x7f2ed29f40ac",
                "1 S lab-agent: n_tty_read",
                "93 D CPU 0/KVM: kvm_vcpu_block",
            ]
        );
    }

    #[test]
    fn a_text_is_cut_at_its_end_or_its_beginning() {
        assert_eq!(first_lines("a\nb", 2), "a\nb");
        assert_eq!(first_lines("a\nb\nc\nd", 2), "a\nb\n... and 2 lines more");
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
    }
}
