//! `--config vm.toml`: the same words as the flags', in TOML.
//!
//! A section is a table (`[cpus]`), a device one of a list of tables (`[[disk]]`); either can be a
//! string too, which then is what would stand after the flag: `serial = "tty"`, `cpus = "boot=2"`,
//! `device = ["0000:01:00.0"]`. An error names the line.

use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::schema::{self, Section};
use super::value::{Reason, Value};
use super::words::{SourcePlace, Wrong};
use crate::config::{Choice, Placing, VmConfig};

/// Reads a file's text into a configuration. Its path is for the messages.
pub(super) fn apply(config: &mut VmConfig, path: &Path, text: &str) -> Result<(), Wrong> {
    let file = File { path, text };
    let document = DeTable::parse(text).map_err(|error| {
        let span = error.span().unwrap_or_default();
        Wrong::Toml(file.place(&span, ""), error.message().to_owned())
    })?;
    for Entry { key, at, value } in entries(document.get_ref()) {
        match key {
            "kernel" => config.kernel = Some(file.text(&value, "kernel")?.into()),
            "firmware" => {
                let firmware = config.firmware.get_or_insert_default();
                file.section(&schema::FIRMWARE, firmware, &value)?;
            }
            "initramfs" => config.initramfs = Some(file.text(&value, "initramfs")?.into()),
            "cmdline" => config.cmdline = Some(file.cmdline(&value)?),
            "cpus" => file.section(&schema::CPUS, &mut config.cpus, &value)?,
            "memory" => file.section(&schema::MEMORY, &mut config.memory, &value)?,
            "memory-zone" => {
                file.list(&schema::MEMORY_ZONE, &mut config.memory_zone, &value)?;
            }
            "numa" => file.list(&schema::NUMA, &mut config.numa, &value)?,
            "place" => config.place = file.place_of(&value)?,
            "balloon" => {
                let balloon = config.balloon.get_or_insert_default();
                file.section(&schema::BALLOON, balloon, &value)?;
            }
            "watchdog" => config.watchdog = file.switch(&value, "watchdog")?,
            "pvpanic" => config.pvpanic = file.switch(&value, "pvpanic")?,
            "tpm" => config.tpm = Some(file.one(&schema::TPM, &value)?),
            "rng" => file.section(&schema::RNG, &mut config.rng, &value)?,
            "serial" => file.section(&schema::SERIAL, &mut config.serial, &value)?,
            "console" => file.section(&schema::CONSOLE, &mut config.console, &value)?,
            "platform" => file.section(&schema::PLATFORM, &mut config.platform, &value)?,
            "disk" => file.list(&schema::DISK, &mut config.disk, &value)?,
            "net" => file.list(&schema::NET, &mut config.net, &value)?,
            "fs" => file.list(&schema::FS, &mut config.fs, &value)?,
            "pmem" => file.list(&schema::PMEM, &mut config.pmem, &value)?,
            "generic-vhost-user" => file.list(&schema::GENERIC, &mut config.generic, &value)?,
            "vsock" => config.vsock = Some(file.one(&schema::VSOCK, &value)?),
            "device" => file.list(&schema::DEVICE, &mut config.device, &value)?,
            "landlock" => config.landlock = file.choice(&value, "landlock")?,
            "landlock-rules" => {
                file.list(&schema::LANDLOCK_RULES, &mut config.landlock_rules, &value)?;
            }
            "jail" => config.jail = file.switch(&value, "jail")?,
            "user" => config.user = Some(file.text(&value, "user")?),
            unknown => {
                return Err(Wrong::UnknownKey {
                    place: file.place(&at, ""),
                    key: unknown.to_owned(),
                    known: schema::TOP.to_vec(),
                });
            }
        }
    }
    Ok(())
}

/// A key and its value, with where they stand.
struct Entry<'a> {
    key: &'a str,
    at: Range<usize>,
    value: Node<'a>,
}

/// A value and where it stands.
struct Node<'a> {
    value: &'a DeValue<'a>,
    span: Range<usize>,
}

impl<'a> Node<'a> {
    fn new(value: &'a Spanned<DeValue<'a>>) -> Self {
        Self {
            value: value.get_ref(),
            span: value.span(),
        }
    }
}

/// A table's entries in the order of the file, so that the first error is the first one in it.
fn entries<'a>(table: &'a DeTable<'a>) -> Vec<Entry<'a>> {
    let mut entries: Vec<_> = table
        .iter()
        .map(|(key, value)| Entry {
            key: key.get_ref(),
            at: key.span(),
            value: Node::new(value),
        })
        .collect();
    entries.sort_by_key(|entry| entry.at.start);
    entries
}

struct File<'a> {
    path: &'a Path,
    text: &'a str,
}

impl File<'_> {
    fn place(&self, span: &Range<usize>, table: &str) -> SourcePlace {
        let before = self.text.bytes().take(span.start);
        let line = 1 + before.filter(|byte| *byte == b'\n').count();
        SourcePlace::File(self.path.to_owned(), line, table.to_owned())
    }

    fn text(&self, node: &Node<'_>, name: &'static str) -> Result<String, Wrong> {
        let place = self.place(&node.span, "");
        let value = scalar(node.value);
        let text = value.text().map_err(|reason| Wrong::Value {
            place,
            key: name,
            reason,
        })?;
        Ok(text.to_owned())
    }

    fn switch(&self, node: &Node<'_>, name: &'static str) -> Result<bool, Wrong> {
        let switch = scalar(node.value).switch();
        switch.map_err(|reason| Wrong::Value {
            place: self.place(&node.span, ""),
            key: name,
            reason,
        })
    }

    /// `auto` or `off`.
    fn place_of(&self, node: &Node<'_>) -> Result<Placing, Wrong> {
        let text = self.text(node, "place")?;
        Placing::of_word(&text).ok_or_else(|| Wrong::Value {
            place: self.place(&node.span, ""),
            key: "place",
            reason: Reason::Word {
                value: text,
                words: &Placing::WORDS,
            },
        })
    }

    fn choice(&self, node: &Node<'_>, name: &'static str) -> Result<Choice, Wrong> {
        let choice = scalar(node.value).choice();
        choice.map_err(|reason| Wrong::Value {
            place: self.place(&node.span, ""),
            key: name,
            reason,
        })
    }

    /// A kernel's command line, which may be empty.
    fn cmdline(&self, node: &Node<'_>) -> Result<String, Wrong> {
        match node.value {
            DeValue::String(text) if text.is_empty() => Ok(String::new()),
            _ => self.text(node, "cmdline"),
        }
    }

    /// A section of which there is one.
    fn section<T>(
        &self,
        section: &Section<T>,
        target: &mut T,
        node: &Node<'_>,
    ) -> Result<(), Wrong> {
        self.part(section, target, node).map(drop)
    }

    /// A section that is there as a whole.
    fn one<T>(&self, section: &Section<T>, node: &Node<'_>) -> Result<T, Wrong> {
        let mut new = (section.blank)();
        let said = self.part(section, &mut new, node)?;
        section.check_required(&said, &self.place(&node.span, section.name))?;
        Ok(new)
    }

    /// A section of which there are several; what is there stays.
    fn list<T>(
        &self,
        section: &Section<T>,
        targets: &mut Vec<T>,
        node: &Node<'_>,
    ) -> Result<(), Wrong> {
        match node.value {
            DeValue::Array(nodes) => {
                for node in nodes.iter() {
                    targets.push(self.one(section, &Node::new(node))?);
                }
            }
            _ => targets.push(self.one(section, node)?),
        }
        Ok(())
    }

    /// Applies a table, or a string that stands for one; the keys that it says.
    fn part<T>(
        &self,
        section: &Section<T>,
        target: &mut T,
        node: &Node<'_>,
    ) -> Result<Vec<&'static str>, Wrong> {
        let place = self.place(&node.span, section.name);
        let mut said = Vec::new();
        match node.value {
            DeValue::Table(table) => {
                let mut entries = entries(table);
                entries.sort_by_key(|entry| section.is_detail(entry.key));
                for Entry { key, at, value } in entries {
                    let place = self.place(&at, section.name);
                    let value = scalar(value.value);
                    let name = section.apply_key(target, key, &value, &place)?;
                    section.say(name, &mut said, &place)?;
                }
            }
            DeValue::String(text) => return section.apply(target, text, &place),
            DeValue::Boolean(_) if section.bare.is_some() => {
                let value = scalar(node.value);
                said.push(section.apply_bare(target, &value, &place)?);
            }
            other => {
                return Err(Wrong::Shape {
                    place,
                    what: format!(
                        "is {}, where a table ([{}]) or the text of the flag --{} is wanted",
                        kind(other),
                        section.name,
                        section.name
                    ),
                });
            }
        }
        Ok(said)
    }
}

/// What a flag could say too, or what it is instead.
fn scalar(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or(Value::Other("a number beyond 64 bits"), Value::Integer),
        DeValue::Boolean(on) => Value::Switch(*on),
        DeValue::Array(values) => {
            Value::List(values.iter().map(|value| scalar(value.get_ref())).collect())
        }
        DeValue::Float(_) | DeValue::Datetime(_) | DeValue::Table(_) => Value::Other(kind(value)),
    }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a point",
        DeValue::Boolean(_) => "a switch",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

#[cfg(test)]
mod tests;
