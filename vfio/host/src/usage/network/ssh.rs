//! The SSH connection that the person who asks came by.

use std::net::IpAddr;

use crate::root::{self, SysRoot};

/// How many processes may stand between this one and the SSH server's.
const FARTHEST: usize = 64;

/// An SSH connection: who sits at the other end, and which of the host's addresses they came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Connection {
    pub(super) client: IpAddr,
    pub(super) here: Option<IpAddr>,
}

impl Connection {
    /// CLIENT PORT SERVER PORT (sshd(8)); an IPv6 address may have a scope.
    fn parse(text: &str) -> Option<Self> {
        let address = |word: &str| {
            let word = word.split('%').next()?;
            word.parse()
                .ok()
                .map(|address: IpAddr| address.to_canonical())
        };
        let mut words = text.split(' ');
        Some(Self {
            client: address(words.next()?)?,
            here: words.nth(1).and_then(address),
        })
    }
}

/// The SSH connection that this process was started from, if one.
///
/// `sudo` drops the variable that says so, so the processes above are asked too.
pub(super) fn connection(root: &SysRoot) -> Option<Connection> {
    let mut process = root.proc.join("self");
    for _ in 0..FARTHEST {
        if let Ok(environment) = std::fs::read(process.join("environ")) {
            let environment = String::from_utf8_lossy(&environment);
            let value = environment
                .split('\0')
                .find_map(|variable| variable.strip_prefix("SSH_CONNECTION="));
            if let Some(connection) = value.and_then(Connection::parse) {
                return Some(connection);
            }
        }
        let status = root::text(&process.join("status"))?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        let parent: u32 = parent.trim().parse().ok().filter(|pid| *pid > 1)?;
        process = root.proc.join(parent.to_string());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ssh_connection_is_two_addresses() {
        let parse = |text| Connection::parse(text).map(|c| (c.client.to_string(), c.here));
        let here = "10.0.0.2".parse().ok();
        assert_eq!(
            parse("::ffff:192.0.2.1 50000 10.0.0.2 22"),
            Some(("192.0.2.1".to_owned(), here))
        );
        assert_eq!(
            parse("fe80::1%eth0 50000"),
            Some(("fe80::1".to_owned(), None))
        );
        assert_eq!(parse("somewhere 1 2 3"), None);
    }
}
