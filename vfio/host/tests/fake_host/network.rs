//! A made-up host's interfaces, their addresses, and its routes.

use std::fs;
use std::path::Path;

use super::FakeHost;
use super::line::Line;

impl FakeHost {
    pub(super) fn expand_interface(&self, line: &Line, device: Option<&Path>) {
        let virtual_devices = Path::new("sys/devices/virtual").to_owned();
        let below = device.map_or(virtual_devices, Path::to_owned);
        let folder = below.join("net").join(line.path(0));
        self.put(&folder.join("operstate"), "up\n");
        let kind = line.get("kind").map(|kind| format!("DEVTYPE={kind}\n"));
        self.put(&folder.join("uevent"), &kind.unwrap_or_default());
        if let Some(port) = line.get("port") {
            self.put(&folder.join("phys_port_name"), &format!("{port}\n"));
        }
        if let Some(index) = line.get("ifindex") {
            self.put(&folder.join("ifindex"), &format!("{index}\n"));
        }
        for upper in line.all("in") {
            let target = format!("sys/devices/virtual/net/{upper}");
            self.point(&folder.join(format!("upper_{upper}")), &target);
        }
        let class = Path::new("sys/class/net").join(line.path(0));
        self.point(&class, folder.to_str().unwrap());
        let name = line.bare(0);
        for address in line.all("ip") {
            let (address, length) = address.split_once('/').unwrap();
            match address.parse().unwrap() {
                std::net::IpAddr::V4(v4) => {
                    let text = format!("     |-- {v4}\n        /32 host LOCAL");
                    self.append("proc/net/fib_trie", &text);
                    let mask = u32::MAX.checked_shl(32 - length.parse::<u32>().unwrap());
                    let mask = mask.unwrap_or(0);
                    self.ipv4_route(&name, u32::from(v4) & mask, mask, 0, 1);
                }
                std::net::IpAddr::V6(v6) => {
                    let digits = format!("{:032x}", u128::from(v6));
                    let length: u8 = length.parse().unwrap();
                    let text = format!("{digits} 02 {length:02x} 00 80 {name:>8}");
                    self.append("proc/net/if_inet6", &text);
                    let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
                    self.ipv6_route(&name, u128::from(v6) & mask, length);
                }
            }
        }
    }

    pub(super) fn expand_route(&self, line: &Line) {
        let name = line
            .get("dev")
            .unwrap_or_else(|| line.wrong("dev= is missing"));
        let to = line.bare(0);
        if to == "default" {
            return self.ipv4_route(&name, 0, 0, 0x0a00_0001, 3);
        }
        if to == "default6" {
            return self.ipv6_route(&name, 0, 0);
        }
        let (address, length) = to.split_once('/').unwrap();
        let address: std::net::Ipv4Addr = address.parse().unwrap();
        let mask = u32::MAX.checked_shl(32 - length.parse::<u32>().unwrap());
        self.ipv4_route(&name, address.into(), mask.unwrap_or(0), 0x0a00_0001, 3);
    }

    /// A line of proc/net/route: numbers as their bytes stand in memory.
    pub(super) fn ipv4_route(&self, name: &str, to: u32, mask: u32, gateway: u32, flags: u16) {
        let [to, mask, gateway] = [to, mask, gateway].map(u32::swap_bytes);
        let line =
            format!("{name}\t{to:08X}\t{gateway:08X}\t{flags:04X}\t0\t0\t100\t{mask:08X}\t0\t0\t0");
        self.append("proc/net/route", &line);
    }

    pub(super) fn ipv6_route(&self, name: &str, to: u128, length: u8) {
        let zero = "0".repeat(32);
        // RTF_UP, and RTF_GATEWAY where it leads everywhere: one that comes with an address has none.
        let flags = if length == 0 { 3 } else { 1 };
        let line =
            format!("{to:032x} {length:02x} {zero} 00 {zero} 00000400 1 0 {flags:08x} {name:>8}");
        self.append("proc/net/ipv6_route", &line);
    }
}
