//! What a NIC can be.

use super::super::limits::{INTERFACE_NAME, MIN_MTU};
use super::super::{Choice, MAX_QUEUES, NET_QUEUE_SIZES, NetConfig, VhostMode};
use super::{InvalidVirtio, back_ends_socket, queue_size};

impl NetConfig {
    /// Whether there can be such a NIC.
    pub(crate) fn check(&self) -> Result<(), InvalidVirtio> {
        let pairs = self.num_queues / 2;
        if !self.num_queues.is_multiple_of(2) || !(1..=MAX_QUEUES).contains(&pairs) {
            return Err(InvalidVirtio::Pairs(self.num_queues));
        }
        self.check_back_end()?;
        if let Some(mtu @ 0..MIN_MTU) = self.mtu {
            return Err(InvalidVirtio::Mtu(mtu));
        }
        if let Some(tap) = self.tap.as_ref().filter(|tap| !is_interface_name(tap)) {
            return Err(InvalidVirtio::TapName(tap.clone()));
        }
        match self.fd.len() {
            0 => {}
            _ if self.tap.is_some() => return Err(InvalidVirtio::TwoTaps),
            files if files != usize::from(pairs) => {
                let queues = self.num_queues;
                return Err(InvalidVirtio::TapFiles { files, queues });
            }
            _ => {}
        }
        queue_size(self.queue_size, NET_QUEUE_SIZES)
    }

    /// Whether the NIC stands on a tap or is another process's, and nothing is said of it that is the other kind's.
    fn check_back_end(&self) -> Result<(), InvalidVirtio> {
        if back_ends_socket(self.vhost_user, self.socket.as_deref())?.is_none() {
            return match (self.vhost_mode, self.spoofchk, self.vhost) {
                (VhostMode::Server, ..) => Err(InvalidVirtio::OnlyOfBackEnds("vhost_mode=server")),
                (_, true, Choice::On) => Err(InvalidVirtio::SourcesByKernel),
                _ => Ok(()),
            };
        }
        for (key, said) in [
            ("tap", self.tap.is_some()),
            ("fd", !self.fd.is_empty()),
            ("vhost", self.vhost != Choice::Auto),
            ("spoofchk", self.spoofchk),
        ] {
            if said {
                return Err(InvalidVirtio::BackEndsChoice(key));
            }
        }
        Ok(())
    }
}

/// What the kernel takes as an interface's name: `dev_valid_name` of linux/netdevice.h.
fn is_interface_name(name: &str) -> bool {
    (1..=INTERFACE_NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && !name
            .bytes()
            .any(|byte| byte == b'/' || byte == b':' || byte.is_ascii_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(change: impl FnOnce(&mut NetConfig)) -> String {
        let mut net = NetConfig {
            vhost_user: true,
            socket: Some("/run/s".into()),
            ..NetConfig::default()
        };
        change(&mut net);
        net.check()
            .map_or_else(|why| why.to_string(), |()| String::new())
    }

    fn tapped(change: impl FnOnce(&mut NetConfig)) -> NetConfig {
        let mut net = NetConfig::default();
        change(&mut net);
        net
    }

    #[test]
    fn a_nic_is_another_processs_by_its_socket_and_nothing_of_a_tap_is_said_of_it() {
        type Change = fn(&mut NetConfig);
        let good: [Change; 6] = [
            |_| {},
            |net| net.vhost_mode = VhostMode::Server,
            |net| (net.num_queues, net.mtu) = (8, Some(9000)),
            |net| *net = NetConfig::default(),
            |net| *net = tapped(|net| net.mtu = Some(9000)),
            |net| *net = tapped(|net| net.spoofchk = true),
        ];
        for change in good {
            assert_eq!(complaint(change), "");
        }
        let wrong: [(Change, &str); 11] = [
            (|net| net.socket = None, "socket=PATH is missing"),
            (|net| net.socket = Some("".into()), "socket=PATH is missing"),
            (|net| net.vhost_user = false, "socket= is for vhost_user=on"),
            (|net| net.tap = Some("t".into()), "tap is for the process"),
            (|net| net.fd = vec![7], "fd is for the process"),
            (|net| net.vhost = Choice::On, "vhost is for the process"),
            (|net| net.mtu = Some(67), "mtu=67 must be from 68 to 65535"),
            (
                |net| {
                    *net = NetConfig {
                        vhost_mode: VhostMode::Server,
                        ..NetConfig::default()
                    }
                },
                "vhost_mode=server is for a device of another process's",
            ),
            (
                |net| *net = tapped(|net| net.mtu = Some(67)),
                "mtu=67 must be from 68 to 65535",
            ),
            (|net| net.spoofchk = true, "spoofchk is for the process"),
            (
                |net| *net = tapped(|net| (net.spoofchk, net.vhost) = (true, Choice::On)),
                "leave vhost= out",
            ),
        ];
        for (change, words) in wrong {
            let why = complaint(change);
            assert!(why.contains(words), "{why}");
        }
    }
}
