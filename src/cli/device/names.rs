//! What devices are called, by the PCI ID database (<https://pci-ids.ucw.cz>).
//!
//! The database is a text of 1.5 MB: the host's own, or the copy beside this file where that is newer
//! or the host has none. It is searched as it stands, and a text that nobody looks at costs a VM nothing.
//!
//! The crate `pci-ids` 0.2.6 has the same database, of the same day, as tables of Rust's references, for
//! which the dynamic linker writes 43,000 relocations before `main`, for every VM too. Measured with a
//! program that only looks one device up, beside one with the text (x86_64, optimised for size): 3.5 MB
//! in place of 1.9 MB on the disk, 2.7 MB in place of 0.1 MB of memory of the process's own, and 0.8 ms
//! more for each start, `device list` or not. It reads no newer list of the host's either.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

/// The copy that is always there. Its head says its date and its licence.
static EMBEDDED: &str = include_str!("pci.ids");

/// Where distributions keep theirs.
const PLACES: [&str; 2] = ["/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids"];

/// The database, with an index of its sections.
#[derive(Debug)]
pub(super) struct Names {
    text: Cow<'static, str>,
    vendors: HashMap<u16, Range<usize>>,
    classes: HashMap<u8, Range<usize>>,
}

impl Names {
    /// The newest database that there is.
    pub(super) fn load() -> Self {
        Self::newest(PLACES.map(Path::new))
    }

    fn newest<'a>(places: impl IntoIterator<Item = &'a Path>) -> Self {
        let texts = places.into_iter().filter_map(|place| fs::read(place).ok());
        let texts = texts.map(|bytes| Cow::Owned(String::from_utf8_lossy(&bytes).into_owned()));
        let newest = texts
            .filter(|text| version(text) > version(EMBEDDED))
            .max_by(|a: &Cow<'_, str>, b| version(a).cmp(&version(b)));
        Self::index(newest.unwrap_or(Cow::Borrowed(EMBEDDED)))
    }

    /// Finds where each vendor's and each class's section is.
    fn index(text: Cow<'static, str>) -> Self {
        let mut vendors = HashMap::new();
        let mut classes = HashMap::new();
        let mut sections = Vec::new();
        let mut start = 0;
        for line in text.split_inclusive('\n') {
            if !line.starts_with(['\t', '#', '\n']) {
                sections.push(start);
            }
            start += line.len();
        }
        sections.push(text.len());
        for section in sections.windows(2) {
            let range = section[0]..section[1];
            let head = text.get(range.clone()).unwrap_or_default();
            let id = head.split_once("  ").map_or("", |(id, _)| id);
            if let Some(class) = id.strip_prefix("C ") {
                if let Ok(class) = u8::from_str_radix(class, 16) {
                    classes.insert(class, range);
                }
            } else if let Ok(vendor) = u16::from_str_radix(id, 16) {
                vendors.insert(vendor, range);
            }
        }
        Self {
            text,
            vendors,
            classes,
        }
    }

    fn section(&self, range: Option<&Range<usize>>) -> Option<&str> {
        self.text.get(range?.clone())
    }

    /// Vendor and device in words; their numbers where the database does not have them.
    pub(super) fn device(&self, vendor: u16, device: u16) -> String {
        let Some(section) = self.section(self.vendors.get(&vendor)) else {
            return format!("{vendor:04x}:{device:04x}");
        };
        let vendor = head(section).map_or("", short_vendor);
        match entry(section, &format!("{device:04x}")) {
            Some(name) => format!("{vendor} {name}"),
            None => format!("{vendor} device {device:04x}"),
        }
    }

    /// What kind of device a class code is: `Ethernet` for 0x020000.
    pub(super) fn class(&self, class: u32) -> String {
        let [_, base, sub, interface] = class.to_be_bytes();
        let section = self.section(self.classes.get(&base));
        let name = section.and_then(|section| {
            // NVMe is what everybody calls it; the database has it as one interface of its subclass.
            if (base, sub, interface) == (0x01, 0x08, 0x02) {
                return Some("NVMe");
            }
            entry(section, &format!("{sub:02x}")).or(head(section))
        });
        match name {
            Some(name) => name.strip_suffix(" controller").unwrap_or(name).to_owned(),
            None => format!("class {base:02x}{sub:02x}"),
        }
    }
}

/// The database's date, as its head says it: `2025.07.11`.
fn version(text: &str) -> Option<&str> {
    let mut lines = text.lines().take(20);
    let version = lines.find_map(|line| line.strip_prefix("#\tVersion: "))?;
    Some(version.trim())
}

/// The name in a section's first line: `8086  Intel Corporation`.
fn head(section: &str) -> Option<&str> {
    Some(section.lines().next()?.split_once("  ")?.1)
}

/// The name of an entry of a section: a line of a tab, its id, and its name.
fn entry<'a>(section: &'a str, id: &str) -> Option<&'a str> {
    section.lines().find_map(|line| {
        let line = line.strip_prefix('\t')?;
        line.strip_prefix(id)?.strip_prefix("  ")
    })
}

/// A vendor's name without what only its lawyers call it.
fn short_vendor(name: &str) -> &str {
    // `Advanced Micro Devices, Inc. [AMD]`; with `[AMD/ATI]` too.
    if let Some((_, short)) = name
        .strip_suffix(']')
        .and_then(|name| name.rsplit_once('['))
    {
        return short;
    }
    let mut name = name;
    while let Some((rest, last)) = name.rsplit_once(' ') {
        let last = last.trim_end_matches(['.', ',']);
        let legal = [
            "Corporation",
            "Corp",
            "Incorporated",
            "Inc",
            "Co",
            "Company",
            "Ltd",
            "Limited",
            "LLC",
            "GmbH",
            "AG",
            "B.V",
            "S.A",
        ];
        if !legal.contains(&last) {
            break;
        }
        name = rest.trim_end_matches(',');
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_database_names_devices_and_classes() {
        let names = Names::index(Cow::Borrowed(EMBEDDED));
        assert_eq!(
            names.device(0x8086, 0x10d3),
            "Intel 82574L Gigabit Network Connection"
        );
        assert_eq!(
            names.device(0x1022, 0x1480),
            "AMD Starship/Matisse Root Complex"
        );
        assert_eq!(names.device(0x8086, 0xfffe), "Intel device fffe");
        assert_eq!(names.device(0xfff0, 0x0001), "fff0:0001");
        assert_eq!(names.class(0x020000), "Ethernet");
        assert_eq!(names.class(0x010802), "NVMe");
        assert_eq!(names.class(0x060400), "PCI bridge");
        assert_eq!(names.class(0x02fe00), "Network");
        assert_eq!(names.class(0xee0100), "class ee01");
    }

    #[test]
    fn a_newer_database_of_the_host_is_preferred_and_an_older_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("pci.ids");
        let write = |date: &str| {
            let text = format!("#\n#\tVersion: {date}\n#\n8086  Intel\n\t10d3  Some NIC\n");
            fs::write(&place, text).unwrap();
            Names::newest([&*place]).device(0x8086, 0x10d3)
        };
        assert_eq!(write("2124.01.01"), "Intel Some NIC");
        assert_eq!(
            write("2001.01.01"),
            "Intel 82574L Gigabit Network Connection"
        );
    }

    #[test]
    fn a_broken_database_does_no_harm() {
        for text in [
            "",
            "\n",
            "\t\t\t",
            "8086",
            "8086  ",
            "C \n\t",
            "zzzz  é\n\t10d3",
            "8086  X\n\t",
        ] {
            let names = Names::index(Cow::Borrowed(text));
            names.device(0x8086, 0x10d3);
            names.class(0x020000);
        }
    }
}
