//! The kinds of threads that a process with VMs has.

/// What a thread is there for. What it may ask of the kernel follows from that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The event loop, and the threads that put a VM together, restart it and take it apart, and open and release
    /// devices, or plug memory: `assemble`, `restart`, `end`, `attach`, `release`, `pause`, `plug`.
    Main,
    /// Runs a processor of the guest: `vcpu0`.
    Vcpu,
    /// Serves a queue of a disk or of persistent memory, or does what of it can wait: `_disk0`, `_disk0-io`, `_pmem0`.
    Disk,
    /// Serves a NIC's queues: `_net0`.
    Net,
    /// Looks after a NIC that the kernel's vhost serves: `_vhost…`.
    Vhost,
    /// Serves sockets between host and guest, or looks after the kernel's vhost that does: `_vsock…`.
    Vsock,
    /// Connects to programs on the host for the former: `vsock-out`.
    VsockPorts,
    /// Connects to the process that serves a device: `vu-fs0`, `vhost-user`.
    VhostUser,
    /// Serves a virtio console: `_console`.
    Console,
    /// Serves the entropy device: `_rng`.
    Entropy,
    /// Plugs and unplugs memory for a memory device: `_memory`.
    Memory,
    /// Accepts and serves connections to the control socket: `http`.
    Http,
    /// Writes log lines: `log`.
    Log,
    /// Writes a console's output: `console-out`.
    ConsoleOutput,
    /// Reads a console's input: `stdin`, `serial-in`.
    Input,
    /// Unmasks a pin whose driver takes no eventfd: `unmask`.
    Unmask,
    /// Has the disk take the firmware's variables: `variables`.
    Variables,
    /// Has swtpm carry out the commands to the guest's TPM: `tpm`.
    Tpm,
    /// Touches the guest's RAM before the guest does.
    Populate,
    /// Has the host take devices' interrupts on the processors of dedicated vCPUs: `steer`.
    Steer,
    /// Measures and writes the boot report: `report`.
    Report,
    /// Draws how far pinning has come: `progress`.
    Progress,
    /// Waits until nobody can reach the process any more: `given-up`.
    GivenUp,
    /// Ends the process where the VM does not end in time after a panic: `end`.
    Watchdog,
    /// Waits, outside of a jail, for the process that is in it: `supervisor`. It is a process of its own, with one thread.
    Supervisor,
}

impl Kind {
    /// Each of them.
    pub const ALL: [Self; 25] = [
        Self::Main,
        Self::Vcpu,
        Self::Disk,
        Self::Net,
        Self::Vhost,
        Self::Vsock,
        Self::VsockPorts,
        Self::VhostUser,
        Self::Console,
        Self::Entropy,
        Self::Memory,
        Self::Http,
        Self::Log,
        Self::ConsoleOutput,
        Self::Input,
        Self::Unmask,
        Self::Variables,
        Self::Tpm,
        Self::Populate,
        Self::Steer,
        Self::Report,
        Self::Progress,
        Self::GivenUp,
        Self::Watchdog,
        Self::Supervisor,
    ];

    /// Those that a process with VMs has, which is all but the one that stays outside.
    pub(super) const OF_VMS: &[Self] = match const { &Self::ALL }.split_last() {
        Some((_, others)) => others,
        None => &[],
    };

    /// That of a virtio device's worker, by the word that its device's automatic names begin with.
    #[must_use]
    pub fn of_worker(device: &str) -> Self {
        match device {
            "disk" | "pmem" => Self::Disk,
            "net" => Self::Net,
            "vhost" => Self::Vhost,
            "vsock" => Self::Vsock,
            "console" => Self::Console,
            "memory" => Self::Memory,
            _ => Self::Entropy,
        }
    }
}
