//! Why a tap interface cannot be had, each with what helps.

use std::io;

use busway_iommu::Command;

/// A tap interface cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// cannot open /dev/net/tun: {source}; {remedy}
    #[error("cannot open /dev/net/tun: {source}; {remedy}")]
    NoTun {
        /// Why.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// this process is in a jail
    #[error(
        "this process is in a jail (--jail), with no network of the host's but the taps that it was started with: pass the \
         tap's descriptor"
    )]
    Jailed,
    /// no socket of the host's network
    #[error("no socket can be made, by which a tap's state is asked for: {0}")]
    Socket(#[source] io::Error),
    /// `{name}` is no name for an interface: it has 1 to 15 characters, none of them a slash, a colon or a space
    #[error(
        "`{name}` is no name for an interface: it has 1 to 15 characters, none of them a slash, a colon or a space"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// tap {name}: not permitted; make it beforehand for this user, with `ip tuntap add dev {example} mode tap user $USER`, or give Busway CAP_NET_ADMIN
    #[error(
        "tap {name}: not permitted; make it beforehand for this user, with `{} user $USER{multi_queue}`, or give Busway CAP_NET_ADMIN",
        add(example)
    )]
    NotPermitted {
        /// The name asked for.
        name: String,
        /// A name for the example.
        example: String,
        /// ` multi_queue` where that is needed.
        multi_queue: &'static str,
    },
    /// tap {name} is in use by another program: stop it, or give another name
    #[error("tap {name} is in use by another program: stop it, or give another name")]
    Busy {
        /// The name.
        name: String,
    },
    /// {name} exists and is not a tap that takes {queues} queues: remove it with `ip link delete dev {name}`, make it with `ip tuntap add dev {name} mode tap multi_queue`, or give another name
    #[error(
        "{name} exists and is not a tap that takes {queues} queues: remove it with `{}`, make it with `{} multi_queue`, or give another name",
        Command::new(["ip", "link", "delete", "dev"]).operand(name),
        add(name)
    )]
    Mismatch {
        /// The name.
        name: String,
        /// How many were asked for.
        queues: u16,
    },
    /// fd={number} is no descriptor that was inherited
    #[error(
        "fd={number} is no descriptor that Busway has inherited: whoever starts Busway opens the tap without \
         close-on-exec, and says its number, 3 or more"
    )]
    NotInherited {
        /// The number.
        number: u32,
    },
    /// the descriptor that was passed, which is {what}, is no tap's
    #[error(
        "the descriptor that was passed, which is {what}, is no tap's: TUNGETIFF: {source}; pass those of a \
         tap, one for each pair of queues"
    )]
    NoTap {
        /// What it is.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// {files} descriptors were passed, and num_queues={queues} needs {pairs}
    #[error(
        "{files} descriptors were passed, and num_queues={queues} needs {pairs}: one for each pair of queues"
    )]
    Count {
        /// How many were.
        files: usize,
        /// How many queues were asked for.
        queues: u16,
        /// How many pairs these are.
        pairs: u16,
    },
    /// {name} was opened in another way than a tap with IFF_NO_PI and IFF_VNET_HDR
    #[error(
        "{name} was opened in another way than a NIC needs it: open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR\
         {multi_queue}"
    )]
    Kind {
        /// The interface.
        name: String,
        /// `, and with IFF_MULTI_QUEUE ...` where that is needed.
        multi_queue: &'static str,
    },
    /// the descriptors are of two taps, {first} and {name}
    #[error("the descriptors are of two taps, {first} and {name}: hand over those of one")]
    Several {
        /// The first's.
        first: String,
        /// Another's.
        name: String,
    },
    /// tap {name} has an MTU of {now}, and this user may not set mtu={mtu}
    #[error(
        "tap {name} has an MTU of {now}, and this user may not set mtu={mtu}: set it beforehand with `{}`, give Busway \
         CAP_NET_ADMIN, or leave mtu= out",
        set_mtu(name, *mtu)
    )]
    MtuNotPermitted {
        /// The interface.
        name: String,
        /// Its MTU, in bytes.
        now: u32,
        /// The MTU that was asked for, in bytes.
        mtu: u16,
    },
    /// tap {name} does not take mtu={mtu}: {source}
    #[error(
        "tap {name} does not take mtu={mtu}: {source}; a tap of Linux takes 68 to 65521, and `ip -d link show dev` \
         what this one does (minmtu, maxmtu)"
    )]
    Mtu {
        /// The interface.
        name: String,
        /// The MTU that was asked for, in bytes.
        mtu: u16,
        /// Why.
        source: io::Error,
    },
    /// tap {name}: {what} failed: {source}
    #[error("tap {name}: {what} failed: {source}")]
    Kernel {
        /// The name.
        name: String,
        /// The ioctl.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The command that makes a tap.
fn add(name: &str) -> Command {
    Command::new(["ip", "tuntap", "add", "dev"])
        .operand(name)
        .operand("mode")
        .operand("tap")
}

/// The command that sets an interface's MTU.
fn set_mtu(name: &str, mtu: u16) -> Command {
    Command::new(["ip", "link", "set", "dev"])
        .operand(name)
        .operand("mtu")
        .operand(mtu.to_string())
}
