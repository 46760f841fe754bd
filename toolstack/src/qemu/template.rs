//! The command line of a clone, made from a template.
//!
//! A template is a complete QEMU command line, program first, that describes the same machine as the parent's, with
//! placeholders where clones must differ. What makes it a clone (where its memory comes from) is added here.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use crate::clones::clone_name;

/// A QEMU command line with placeholders, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    words: Vec<String>,
}

/// What makes a clone itself. The placeholders are the names of the fields, and `dir`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its number in the fork, from 1.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// A fresh UUID, for SMBIOS.
    pub uuid: Uuid,
    /// A fresh VM generation id, by which the guest notices that it is a copy and reseeds its random numbers.
    pub vmgenid: Uuid,
    /// A fresh MAC address under QEMU's prefix 52:54:00.
    pub mac: String,
}

/// A command line that is no template for clones.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TemplateError {
    /// No words.
    #[error("the template is empty; give QEMU's whole command line after `--`, beginning with its program")]
    Empty,
    /// A word in braces that means nothing.
    #[error(
        "{word:?} has the unknown placeholder {{{placeholder}}}; there are {{id}}, {{name}}, {{uuid}}, {{vmgenid}}, {{mac}}, {{dir}}"
    )]
    Placeholder {
        /// The word of the template.
        word: String,
        /// What stands in braces.
        placeholder: String,
    },
    /// An option that a clone cannot have.
    #[error("the template must not say {option}: {why}")]
    Option {
        /// The option.
        option: String,
        /// Why not.
        why: &'static str,
    },
    /// A listening socket that all clones would take from each other.
    #[error("{0:?} listens at one address for all clones and the parent; put {{dir}} or {{id}} into it")]
    SharedSocket(String),
    /// A name that QEMU's option syntax or a file name cannot carry.
    #[error(
        "{0:?} is no name for a clone: only letters, digits, `.`, `_` and `-` are allowed, and {{id}} where it is a template"
    )]
    Name(String),
    /// A directory that QEMU's options cannot carry.
    #[error("{} has a comma, which QEMU's options cannot carry; set XDG_RUNTIME_DIR to another directory", .0.display())]
    Comma(PathBuf),
}

/// Options that decide where a clone's memory or process comes from, which is ours to say.
const FORBIDDEN: [(&str, &str); 4] = [
    ("incoming", "the clone's memory comes from its pager"),
    ("daemonize", "clones are watched as children, and end with this command"),
    ("loadvm", "the clone's state comes from the descriptor"),
    ("preconfig", "the clone would wait for QMP before its state is loaded"),
];

const PLACEHOLDERS: [&str; 6] = ["id", "name", "uuid", "vmgenid", "mac", "dir"];

impl Template {
    /// Checks the words of a template.
    ///
    /// # Errors
    /// When a word would break a clone: unknown placeholders, options that are ours, listening sockets in common.
    pub fn new(words: Vec<String>) -> Result<Self, TemplateError> {
        if words.is_empty() {
            return Err(TemplateError::Empty);
        }
        for word in &words {
            check_placeholders(word)?;
            if let Some(name) = option_name(word)
                && let Some((_, why)) = FORBIDDEN.iter().find(|(option, _)| *option == name)
            {
                return Err(TemplateError::Option { option: word.clone(), why });
            }
            let listens = word.contains(",server=on") || word.contains(",server,") || word.ends_with(",server");
            if listens && placeholders(word).next().is_none() {
                return Err(TemplateError::SharedSocket(word.clone()));
            }
        }
        Ok(Self { words })
    }

    /// The words for one clone, whose directory is `dir`.
    pub fn words(&self, identity: &Identity, dir: &Path) -> Vec<String> {
        self.words.iter().map(|word| fill(word, identity, dir)).collect()
    }

    /// Whether the template has one of these options, named without dashes.
    pub fn has(&self, options: &[&str]) -> bool {
        self.words.iter().filter_map(|word| option_name(word)).any(|name| options.contains(&name))
    }
}

impl Identity {
    /// A fresh identity for clone `id`, named by a template in which `{id}` stands for the number.
    ///
    /// # Errors
    /// When the name is none.
    pub fn fresh(id: u32, name: &str) -> Result<Self, TemplateError> {
        let name = clone_name(name, id).map_err(TemplateError::Name)?;
        let [a, b, c, ..] = *Uuid::new_v4().as_bytes();
        let mac = format!("52:54:00:{a:02x}:{b:02x}:{c:02x}");
        Ok(Self { id, name, uuid: Uuid::new_v4(), vmgenid: Uuid::new_v4(), mac })
    }
}

fn fill(word: &str, identity: &Identity, dir: &Path) -> String {
    let Identity { id, name, uuid, vmgenid, mac } = identity;
    let mut filled = word.to_owned();
    let values = [id.to_string(), name.clone(), uuid.to_string(), vmgenid.to_string(), mac.clone()];
    for (placeholder, value) in PLACEHOLDERS.iter().zip(values.into_iter().chain([dir.display().to_string()])) {
        filled = filled.replace(&format!("{{{placeholder}}}"), &value);
    }
    filled
}

fn check_placeholders(word: &str) -> Result<(), TemplateError> {
    match placeholders(word).find(|name| !PLACEHOLDERS.contains(name)) {
        Some(unknown) => Err(TemplateError::Placeholder { word: word.to_owned(), placeholder: unknown.to_owned() }),
        None => Ok(()),
    }
}

/// The lower-case words in braces. QEMU's own braces are JSON objects, whose first character is a quote.
fn placeholders(word: &str) -> impl Iterator<Item = &str> {
    word.split('{')
        .skip(1)
        .filter_map(|rest| rest.split_once('}'))
        .map(|(name, _)| name)
        .filter(|name| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase()))
}

/// The name of the option that a word is; QEMU takes one dash or two.
fn option_name(word: &str) -> Option<&str> {
    let name = word.strip_prefix('-')?;
    Some(name.strip_prefix('-').unwrap_or(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(words: &[&str]) -> Result<Template, TemplateError> {
        Template::new(words.iter().map(|&word| word.to_owned()).collect())
    }

    #[test]
    fn placeholders_are_filled() {
        let words = ["qemu", "-name", "{name}", "-device", "vmgenid,guid={vmgenid}", "-serial", "file:{dir}/{id}.log"];
        let identity = Identity::fresh(3, "web-{id}").unwrap();
        let filled = template(&words).unwrap().words(&identity, Path::new("/run/x"));
        let guid = format!("vmgenid,guid={}", identity.vmgenid);
        assert_eq!(filled, ["qemu", "-name", "web-3", "-device", &guid, "-serial", "file:/run/x/3.log"]);
    }

    #[test]
    fn identities_differ() {
        let [one, two] = [1, 2].map(|id| Identity::fresh(id, "c{id}").unwrap());
        assert!(one.uuid != two.uuid && one.vmgenid != two.vmgenid && one.mac != two.mac && one.uuid != one.vmgenid);
        assert!(one.mac.starts_with("52:54:00:") && one.mac.len() == 17);
    }

    #[test]
    fn what_would_break_a_clone_is_refused() {
        let refused = |words: &[&str]| template(words).unwrap_err();
        assert_eq!(refused(&[]), TemplateError::Empty);
        assert!(
            matches!(refused(&["q", "-name", "{nmae}"]), TemplateError::Placeholder { placeholder, .. } if placeholder == "nmae")
        );
        assert!(matches!(refused(&["q", "-incoming", "defer"]), TemplateError::Option { .. }));
        assert!(matches!(refused(&["q", "--daemonize"]), TemplateError::Option { .. }));
        assert!(matches!(refused(&["q", "-qmp", "unix:/a,server=on,wait=off"]), TemplateError::SharedSocket(_)));
        assert!(matches!(refused(&["q", "-qmp", "unix:/a,server"]), TemplateError::SharedSocket(_)));
        for name in ["", "a,b", "a b", "../x{id}"] {
            assert_eq!(Identity::fresh(1, name), Err(TemplateError::Name(name.replace("{id}", "1"))), "{name}");
        }
    }

    #[test]
    fn json_options_are_no_placeholders() {
        let json = r#"{"driver":"qcow2","file":{"driver":"file","filename":"{dir}/disk"}}"#;
        let identity = Identity::fresh(1, "c").unwrap();
        let filled = template(&["q", "-blockdev", json]).unwrap().words(&identity, Path::new("/run"));
        assert_eq!(filled[2], r#"{"driver":"qcow2","file":{"driver":"file","filename":"/run/disk"}}"#);
    }
}
