//! `busway device vfs`: its words, and the table of what there is.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use busway_host::{Called, Command, Functions, Kernel, SysRoot, VfSetting, VfsOptions};
use clap::Args;

use super::binding::{Changes, Said};
use crate::cli::options;
use crate::cli::value::Value;

/// `busway device vfs`
#[derive(Args, Clone, Debug)]
pub struct VfsArgs {
    /// The device that makes them: 0000:01:00.0, 01:00.0, 10de:1b81, enp1s0f0, or a file of sysfs
    #[arg(value_name = "DEVICE")]
    pub address: Called,

    /// How many there are to be; 0 removes all
    ///
    /// The kernel makes them all at once, so that for another number those there are go first.
    #[arg(value_name = "COUNT")]
    pub count: Option<u16>,

    /// Set one: N,mac=…,vlan=…,trust=on|off,spoofchk=on|off
    ///
    /// N counts from 0. A vlan of 0 is none. New ones are set before a driver sees them. May be given
    /// for each.
    #[arg(long = "vf", value_name = "N,KEY=VALUE,…", value_parser = vf)]
    pub vfs: Vec<Vf>,

    /// Keep the host's drivers from them, for guests to have
    ///
    /// Drivers that are loaded later are kept from them, too, until they are removed or the device is
    /// restored.
    #[arg(long, requires = "count")]
    pub no_autoprobe: bool,

    /// Print what would be done, as commands, and do nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

/// What one virtual function is set to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vf {
    index: u32,
    settings: Vec<VfSetting>,
}

fn vf(text: &str) -> Result<Vf, String> {
    let items = options::parse(text).map_err(|error| error.to_string())?;
    let mut items = items.into_iter();
    let index = items.next().filter(|item| item.key.is_none());
    let index = index.and_then(|item| item.value.number::<u16>().ok());
    let index = index.ok_or("the number of the function comes first: 0,mac=02:00:00:00:00:01")?;
    let settings = items.map(|item| match item.key.as_deref() {
        Some("mac") => {
            let mac = item.value.mac().map_err(|error| error.to_string());
            mac.map(VfSetting::Mac)
        }
        Some("vlan") => match item.value.number::<u16>() {
            Ok(id @ 0..=4094) => Ok(VfSetting::Vlan(id)),
            _ => Err(format!(
                "vlan={} is not from 1 to 4094, or 0 for none",
                item.value
            )),
        },
        Some("trust") => switch(&item.value).map(VfSetting::Trust),
        Some("spoofchk") => switch(&item.value).map(VfSetting::SpoofCheck),
        other => Err(format!(
            "`{}` is not one of mac=, vlan=, trust= and spoofchk=",
            other.map_or_else(|| item.value.to_string(), str::to_owned)
        )),
    });
    let settings: Vec<_> = settings.collect::<Result<_, _>>()?;
    match settings.is_empty() {
        true => Err("there is nothing to set: mac=, vlan=, trust=, spoofchk=".to_owned()),
        false => Ok(Vf {
            index: u32::from(index),
            settings,
        }),
    }
}

fn switch(value: &Value) -> Result<bool, String> {
    value.switch().map_err(|error| error.to_string())
}

pub(super) fn vfs(args: &VfsArgs, root: &SysRoot, kernel: &mut dyn Kernel) -> Said {
    let address = match args.address.find(root) {
        Ok(address) => address,
        Err(error) => return (String::new(), Err(error.into())),
    };
    let mut settings: BTreeMap<u32, Vec<VfSetting>> = BTreeMap::new();
    for Vf {
        index,
        settings: more,
    } in &args.vfs
    {
        settings.entry(*index).or_default().extend(more);
    }
    let options = VfsOptions {
        count: args.count,
        settings,
        no_autoprobe: args.no_autoprobe,
    };
    let mut changes = Changes::new(root, kernel, args.dry_run);
    match changes.make(|session| busway_host::vfs(session, address, &options)) {
        Ok(functions) => (changes.said(&[functions], table), Ok(())),
        Err(error) => (changes.said(&[], table), Err(error.into())),
    }
}

/// What there is, in words.
fn table(functions: &Functions) -> String {
    let Functions {
        physical,
        total,
        interface,
        functions,
    } = functions;
    let mut text = physical.to_string();
    if let Some((name, _)) = interface {
        let _ = write!(text, " ({name})");
    }
    let _ = writeln!(text, ": {} of {total} virtual functions", functions.len());
    if functions.is_empty() {
        return text;
    }
    let dash = || "-".to_owned();
    let switch =
        |on: Option<bool>| on.map_or_else(dash, |on| if on { "on" } else { "off" }.to_owned());
    let mut rows = vec![
        [
            "VF", "ADDRESS", "GROUP", "DRIVER", "MAC", "VLAN", "TRUST", "SPOOFCHK",
        ]
        .map(str::to_owned),
    ];
    for function in functions {
        let state = function.state.unwrap_or_default();
        rows.push([
            function.index.to_string(),
            function.address.to_string(),
            function.group.map_or_else(dash, |group| group.to_string()),
            function.driver.clone().unwrap_or_else(dash),
            state.mac.map_or_else(dash, |mac| mac.to_string()),
            state.vlan.map_or_else(dash, |id| id.to_string()),
            switch(state.trust),
            switch(state.spoof_check),
        ]);
    }
    text += &aligned(&rows);
    if let Some((name, false)) = interface {
        let _ = writeln!(
            text,
            "{name} is down, and its functions have no link until: {}",
            Command::new(["ip", "link", "set", "dev"])
                .operand(name)
                .operand("up")
        );
    }
    text
}

/// Rows in columns as wide as the widest in each.
pub(in crate::cli) fn aligned<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use busway_host::Mac;

    use super::*;

    #[test]
    fn a_function_is_set_by_number_and_keys() {
        let set = vf("1,mac=02:00:00:00:00:07,vlan=100,trust=on,spoofchk=off").unwrap();
        assert_eq!(set.index, 1);
        assert_eq!(
            set.settings,
            [
                VfSetting::Mac(Mac([2, 0, 0, 0, 0, 7])),
                VfSetting::Vlan(100),
                VfSetting::Trust(true),
                VfSetting::SpoofCheck(false),
            ]
        );
    }

    #[test]
    fn what_cannot_be_set_is_named() {
        for (text, says) in [
            (
                "mac=02:00:00:00:00:07",
                "number of the function comes first",
            ),
            ("0", "nothing to set"),
            ("0,mac=01:00:5e:00:00:01", "no MAC address of one interface"),
            ("0,mac=02:00", "`02:00` is no MAC address"),
            ("0,vlan=4095", "vlan=4095 is not from 1"),
            ("0,trust=maybe", "`maybe` is neither on nor off"),
            ("0,rate=5", "`rate` is not one of"),
        ] {
            let error = vf(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
