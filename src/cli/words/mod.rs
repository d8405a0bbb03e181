//! Applying what was said to a configuration: flags by their `key=value` lists, and the errors of both
//! flags and file, which name the place, the key, the value, why, and the nearest right word.

use std::fmt;
use std::path::PathBuf;

use super::nearest::Nearest;
use super::options::{self, Item, SyntaxError};
use super::schema::Section;
use super::value::{Reason, Value, Words};

/// Where something was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SourcePlace {
    /// A flag, by its name without dashes, and the text after it.
    Flag(&'static str, String),
    /// A line of the file, and the table it stands in (empty at the top).
    File(PathBuf, usize, String),
}

impl fmt::Display for SourcePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name, text) if text.is_empty() => write!(f, "--{name}"),
            Self::Flag(name, text) => write!(f, "--{name} {text}"),
            Self::File(path, line, table) if table.is_empty() => {
                write!(f, "{}, line {line}", path.display())
            }
            Self::File(path, line, table) => write!(f, "{}, line {line}: {table}", path.display()),
        }
    }
}

/// A place and a key there: `--memory size=5X: size`, `vm.toml, line 2: memory.size`.
fn at_key(place: &SourcePlace, key: &str) -> String {
    match place {
        SourcePlace::File(_, _, table) if !table.is_empty() => format!("{place}.{key}"),
        _ => format!("{place}: {key}"),
    }
}

/// What is wrong with what was said.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Wrong {
    /// {place}: {syntax}
    #[error("{0}: {1}")]
    Syntax(SourcePlace, SyntaxError),
    /// The file's language.
    #[error("{0}: {1}")]
    Toml(SourcePlace, String),
    /// A key there is none of.
    #[error("{}", unknown_key(place, key, known))]
    UnknownKey {
        /// Where.
        place: SourcePlace,
        /// What was said.
        key: String,
        /// What could have been.
        known: Vec<&'static str>,
    },
    /// {place}: `{key}` is given twice
    #[error("{place}: `{key}` is given twice")]
    Twice {
        /// Where.
        place: SourcePlace,
        /// The key.
        key: &'static str,
    },
    /// {place}: only one of these can be said
    #[error("{0}: only one of these can be said")]
    Several(SourcePlace),
    /// {place}: `{key}` is missing
    #[error("{place}: `{}` is missing", keys.join("` or `"))]
    Missing {
        /// Where.
        place: SourcePlace,
        /// The key, or those of which one would do.
        keys: &'static [&'static str],
    },
    /// A value that no key introduces.
    #[error(
        "{place}: `{value}` has no key: write key=value; the keys are {}",
        Words(known)
    )]
    NoKey {
        /// Where.
        place: SourcePlace,
        /// The value.
        value: String,
        /// The keys.
        known: Vec<&'static str>,
    },
    /// {place}: {key}: {reason}
    #[error("{}: {reason}", at_key(place, key))]
    Value {
        /// Where.
        place: SourcePlace,
        /// The key.
        key: &'static str,
        /// Why its value is none.
        reason: Reason,
    },
    /// A value without a key that is none.
    #[error("{0}: {1}")]
    Bare(SourcePlace, Reason),
    /// Another kind of thing stands where a table, a list or a word must be.
    #[error("{place}: {what}")]
    Shape {
        /// Where.
        place: SourcePlace,
        /// What it should be.
        what: String,
    },
}

fn unknown_key(place: &SourcePlace, key: &str, known: &[&'static str]) -> String {
    let nearest = Nearest(key, known);
    let words = Words(known);
    match place {
        SourcePlace::Flag(name, _) => {
            format!("--{name}: unknown key `{key}`{nearest} (there are: {words})")
        }
        SourcePlace::File(path, line, table) => {
            let path = path.display();
            let of = if table.is_empty() {
                String::new()
            } else {
                format!(" of `{table}`")
            };
            format!("{path}: unknown key `{key}`{of}, line {line}{nearest} (there are: {words})")
        }
    }
}

impl<T> Section<T> {
    /// Applies one value of the flag, which may say some of the keys; those that it says.
    pub(super) fn apply(
        &self,
        target: &mut T,
        text: &str,
        place: &SourcePlace,
    ) -> Result<Vec<&'static str>, Wrong> {
        let mut items =
            options::parse(text).map_err(|error| Wrong::Syntax(place.clone(), error))?;
        items.sort_by_key(|item| item.key.as_deref().is_some_and(|key| self.is_detail(key)));
        let mut said = Vec::with_capacity(items.len());
        for Item { key, value } in items {
            let name = match key {
                Some(key) => self.apply_key(target, &key, &value, place)?,
                None => self.apply_bare(target, &value, place)?,
            };
            self.say(name, &mut said, place)?;
        }
        Ok(said)
    }

    /// Makes a new one of the flag's value, which must say the required key.
    pub(super) fn make(&self, text: &str, place: &SourcePlace) -> Result<T, Wrong> {
        let mut new = (self.blank)();
        let said = self.apply(&mut new, text, place)?;
        self.check_required(&said, place)?;
        Ok(new)
    }

    /// Each key can be said once, and one that excludes the others only alone.
    pub(super) fn say(
        &self,
        name: &'static str,
        said: &mut Vec<&'static str>,
        place: &SourcePlace,
    ) -> Result<(), Wrong> {
        if said.contains(&name) {
            return Err(Wrong::Twice {
                place: place.clone(),
                key: name,
            });
        }
        let excludes = |name: &str| !self.is_detail(name);
        if self.single && excludes(name) && said.iter().any(|said| excludes(said)) {
            return Err(Wrong::Several(place.clone()));
        }
        said.push(name);
        Ok(())
    }

    /// Applies one key.
    pub(super) fn apply_key(
        &self,
        target: &mut T,
        name: &str,
        value: &Value,
        place: &SourcePlace,
    ) -> Result<&'static str, Wrong> {
        let key = self.key(name).ok_or_else(|| Wrong::UnknownKey {
            place: place.clone(),
            key: name.to_owned(),
            known: self.names(),
        })?;
        (key.set)(target, value).map_err(|reason| Wrong::Value {
            place: place.clone(),
            key: key.name,
            reason,
        })?;
        Ok(key.name)
    }

    /// Applies a value that stands without a key, for what it says; it counts as the (first) required key.
    pub(super) fn apply_bare(
        &self,
        target: &mut T,
        value: &Value,
        place: &SourcePlace,
    ) -> Result<&'static str, Wrong> {
        let set = self.bare.ok_or_else(|| Wrong::NoKey {
            place: place.clone(),
            value: value.to_string(),
            known: self.names(),
        })?;
        set(target, value).map_err(|reason| Wrong::Bare(place.clone(), reason))?;
        Ok(self.required.first().copied().unwrap_or(self.name))
    }

    /// A required key must have been said.
    pub(super) fn check_required(
        &self,
        said: &[&'static str],
        place: &SourcePlace,
    ) -> Result<(), Wrong> {
        if self.required.is_empty() || self.required.iter().any(|key| said.contains(key)) {
            return Ok(());
        }
        Err(Wrong::Missing {
            place: place.clone(),
            keys: self.required,
        })
    }
}

#[cfg(test)]
mod tests;
