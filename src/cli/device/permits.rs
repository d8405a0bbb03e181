//! The switches that allow what stands against moving a device: one for each reason.

use busway_host::{Permit, Permits};
use clap::Args;

/// The heading of these switches in a help text.
const HEADING: &str = "In spite of what stands against it";

/// What `busway device bind` can be allowed.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = HEADING)]
pub struct BindPermits {
    /// Take a disk whose file system is mounted
    #[arg(long)]
    pub allow_mounted: bool,
    /// Take a disk that the host itself runs from: /, /usr, /var, /boot
    #[arg(long)]
    pub allow_system: bool,
    /// Take a disk that the host swaps to
    #[arg(long)]
    pub allow_swap: bool,
    /// Take a disk that LVM, RAID or encryption stands on
    #[arg(long)]
    pub allow_holders: bool,
    /// Take a disk that somebody has for themselves: ZFS, a container, a program
    #[arg(long)]
    pub allow_claimed: bool,
    /// Take the interface that the default route, your SSH session, a bond or a bridge goes through
    #[arg(long)]
    pub allow_route: bool,
    /// Take the display that the host's console appears on
    #[arg(long)]
    pub allow_display: bool,
    /// Take a device of which programs have a node open: a disk, a card, a port
    #[arg(long)]
    pub allow_programs: bool,
    /// Take a device that has virtual functions, which end with its driver
    #[arg(long)]
    pub allow_vfs: bool,
    /// Bind some of an IOMMU group, though others stay with the host
    #[arg(long)]
    pub allow_group: bool,
}

impl BindPermits {
    pub(super) fn all(self) -> Permits {
        let switches = [
            (self.allow_mounted, Permit::Mounted),
            (self.allow_system, Permit::System),
            (self.allow_swap, Permit::Swap),
            (self.allow_holders, Permit::Holders),
            (self.allow_claimed, Permit::Claimed),
            (self.allow_route, Permit::Route),
            (self.allow_display, Permit::Display),
            (self.allow_programs, Permit::Programs),
            (self.allow_vfs, Permit::VirtualFunctions),
            (self.allow_group, Permit::Group),
        ];
        let given = switches.into_iter().filter(|(given, _)| *given);
        given.map(|(_, permit)| permit).collect()
    }
}

/// What `busway device unbind` and `restore` can be allowed.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = HEADING)]
pub struct UnbindPermits {
    /// Have the kernel ask the process that has it open to release it, and wait for that
    #[arg(long)]
    pub allow_open: bool,
}

impl UnbindPermits {
    pub(super) fn all(self) -> Permits {
        self.allow_open
            .then_some(Permit::Open)
            .into_iter()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    #[test]
    fn every_reason_has_the_switch_that_its_refusal_names() {
        let switches = |command: Command| -> Vec<String> {
            let long = command.get_arguments().filter_map(|arg| arg.get_long());
            long.map(|name| format!("--{name}")).collect()
        };
        let mut all = switches(BindPermits::augment_args(Command::new("bind")));
        all.extend(switches(UnbindPermits::augment_args(Command::new(
            "unbind",
        ))));
        let named: Vec<_> = Permit::ALL.iter().map(|permit| permit.switch()).collect();
        assert_eq!(all, named);
    }
}
