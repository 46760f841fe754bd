//! What a clone is by configuration: the parent's own, as xl keeps it in JSON, or one of the user's, with another identity.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use thiserror::Error;
use uuid::Uuid;

use super::cfg::{self, Assignment, CfgError};
use super::disk;
use super::identity::Identity;

/// A configuration that no clones can be made by.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// xl did not keep the parent's.
    #[error("xl keeps no configuration of the parent; give one for the clones by --config")]
    None,
    /// Something else than a configuration.
    #[error("the configuration of the domain that xl keeps is not understood; give one for the clones by --config")]
    Json(#[source] Option<serde_json::Error>),
    /// The user's is none.
    #[error("{path} is no configuration of xl")]
    Cfg {
        /// Its file.
        path: String,
        /// Where not.
        source: CfgError,
    },
    /// Disks that the clones would destroy.
    #[error(
        "the clones would write to {disks} together{parent}, which destroys what is on it. Give each a disk of its own: by --config \
         with {{id}} or {{name}} in the disk's name; or say --share-disks where they may, as on a cluster file system"
    )]
    Disks {
        /// The disks.
        disks: String,
        /// With whom besides.
        parent: &'static str,
    },
    /// Devices of the host.
    #[error(
        "the domain has devices of the host ({0}), which no two domains can have; nor can Xen page out the memory of such a domain"
    )]
    PassedThrough(&'static str),
    /// Another machine than the parent's.
    #[error("{setting} is {value} in {path} and {parent} in the parent; a clone is the same machine")]
    Machine {
        /// The setting.
        setting: &'static str,
        /// Its value in the file.
        value: String,
        /// The file.
        path: String,
        /// What it has to be.
        parent: u64,
    },
}

/// A configuration of a domain in JSON.
#[derive(Clone, Debug)]
pub(super) struct Config(Value);

impl Config {
    /// The configuration in a stream.
    ///
    /// # Errors
    /// When it is none.
    pub(super) fn new(json: Option<&str>) -> Result<Self, ConfigError> {
        let value: Value =
            serde_json::from_str(json.ok_or(ConfigError::None)?).map_err(|error| ConfigError::Json(Some(error)))?;
        Self::checked(value)
    }

    /// The configuration of the only domain in what `xl list -l` says of it.
    ///
    /// # Errors
    /// When it has none.
    pub(super) fn of_list(json: &str) -> Result<Self, ConfigError> {
        let mut domains: Value = serde_json::from_str(json).map_err(|error| ConfigError::Json(Some(error)))?;
        Self::checked(
            domains.get_mut(0).and_then(|domain| domain.get_mut("config")).map(Value::take).unwrap_or_default(),
        )
    }

    fn checked(value: Value) -> Result<Self, ConfigError> {
        if value["c_info"].is_object() { Ok(Self(value)) } else { Err(ConfigError::Json(None)) }
    }

    /// Refuses devices that cannot be cloned, and, unless the disks are `shared`, disks that clones must not write to together.
    pub(super) fn check(&self, shared: bool) -> Result<(), ConfigError> {
        for (kind, name) in [("pcidevs", "PCI"), ("usbdevs", "USB"), ("dtdevs", "device tree")] {
            if !self.list(kind).is_empty() {
                return Err(ConfigError::PassedThrough(name));
            }
        }
        let name = |disk: &Value| {
            let path = disk["pdev_path"].as_str().filter(|path| !path.is_empty()).or(disk["vdev"].as_str());
            path.unwrap_or("a disk without a name").to_owned()
        };
        let disks: Vec<String> = self.written_disks().into_iter().map(name).collect();
        if !shared && !disks.is_empty() {
            return Err(ConfigError::Disks { disks: disks.join(", "), parent: " and with their parent" });
        }
        Ok(())
    }

    /// What the disks are on that the domain writes to, as far as it is somewhere.
    fn written_paths(&self) -> Vec<String> {
        let path = |disk: &Value| disk["pdev_path"].as_str().map(disk::absolute);
        self.written_disks().into_iter().filter_map(path).filter(|path| !path.is_empty()).collect()
    }

    /// The disks that the domain writes to.
    fn written_disks(&self) -> Vec<&Value> {
        let is_written = |disk: &&Value| {
            let number_or_bool =
                |value: &Value| value.as_i64().is_some_and(|number| number != 0) || value.as_bool() == Some(true);
            number_or_bool(&disk["readwrite"])
        };
        self.list("disks").iter().filter(is_written).collect()
    }

    /// The addresses of its network interfaces.
    pub(super) fn macs(&self) -> Vec<String> {
        self.list("nics").iter().map(|nic| nic["mac"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// The same domain with another identity. A generation id, by which an HVM guest notices that it is a copy, is a new one too.
    pub(super) fn for_clone(&self, identity: &Identity) -> String {
        let mut config = self.0.clone();
        config["c_info"]["name"] = json!(identity.name);
        config["c_info"]["uuid"] = json!(identity.uuid);
        if let Some(info) = config["c_info"].as_object_mut() {
            // A number that the parent was to keep.
            info.remove("domid");
        }
        let nics = config.get_mut("nics").and_then(Value::as_array_mut).into_iter().flatten();
        for (nic, mac) in nics.zip(&identity.macs) {
            if let Some(nic) = nic.as_object_mut() {
                nic.insert("mac".to_owned(), json!(mac.to_string()));
                // The name of the host's end, which is made up where it is not said.
                nic.remove("ifname");
            }
        }
        let hvm = config.get_mut("b_info").and_then(|info| info.get_mut("type.hvm"));
        if let Some(generation) = hvm.and_then(|hvm| hvm.get_mut("ms_vm_genid")) {
            *generation = json!(Uuid::new_v4().as_bytes());
        }
        config.to_string()
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.0["b_info"][name].as_u64()
    }

    fn list(&self, name: &str) -> &[Value] {
        self.0[name].as_array().map_or(&[], Vec::as_slice)
    }
}

/// A configuration file for clones, with placeholders where they differ.
#[derive(Clone, Debug)]
pub(super) struct Template {
    text: String,
    assignments: Vec<Assignment>,
    path: String,
}

/// Settings that this command makes.
const OURS: [&str; 3] = ["name", "uuid", "vif"];

impl Template {
    /// # Errors
    /// When `text`, that of the file at `path`, is no configuration.
    pub(super) fn new(text: String, path: &Path) -> Result<Self, ConfigError> {
        let path = path.display().to_string();
        match cfg::parse(&text) {
            Ok(assignments) => Ok(Self { text, assignments, path }),
            Err(source) => Err(ConfigError::Cfg { path, source }),
        }
    }

    /// Refuses another machine than the parent's, and, unless the disks are `shared`, disks that clones of these names would write to
    /// together, or with their parent.
    pub(super) fn check(&self, parent: Option<&Config>, names: &[String], shared: bool) -> Result<(), ConfigError> {
        let settings = [("memory", "target_memkb", 1024), ("vcpus", "max_vcpus", 1)];
        for (setting, field, unit) in settings {
            let value = cfg::strings(&self.assignments, setting).pop();
            let number = value.as_deref().and_then(|value| value.parse::<u64>().ok());
            let wanted = parent.and_then(|parent| parent.number(field)).map(|number| number / unit);
            if let (Some(value), Some(parent)) = (value, wanted)
                && number != Some(parent)
            {
                return Err(ConfigError::Machine { setting, value, path: self.path.clone(), parent });
            }
        }
        if !cfg::strings(&self.assignments, "pci").is_empty() {
            return Err(ConfigError::PassedThrough("PCI"));
        }
        if shared {
            return Ok(());
        }
        let parents = parent.map(Config::written_paths).unwrap_or_default();
        let mut taken = HashSet::new();
        for (id, name) in (1..).zip(names) {
            // Its directory and its UUID will be its own, whichever they are.
            let own = Identity { id, name: name.clone(), uuid: Uuid::from_u128(id.into()), macs: Vec::new() };
            let dir = PathBuf::from(format!("/clone-{id}"));
            for spec in cfg::strings(&self.assignments, "disk") {
                let spec = fill(&spec, &own, &dir);
                let target = disk::target(&spec);
                if target.is_empty() || !disk::is_written(&spec) {
                    continue;
                }
                if parents.contains(&target) {
                    return Err(ConfigError::Disks { disks: target, parent: " and with their parent" });
                }
                if !taken.insert(target.clone()) {
                    return Err(ConfigError::Disks { disks: target, parent: "" });
                }
            }
        }
        Ok(())
    }

    /// The network interfaces.
    pub(super) fn interfaces(&self) -> usize {
        cfg::strings(&self.assignments, "vif").len()
    }

    /// The configuration of one clone, whose directory is `dir`.
    pub(super) fn for_clone(&self, identity: &Identity, dir: &Path) -> String {
        let mut text = self.text.clone();
        let ours = self.assignments.iter().filter(|assignment| OURS.contains(&assignment.name.as_str()));
        for assignment in ours.rev() {
            text.replace_range(assignment.place.clone(), "");
        }
        let Identity { name, uuid, macs, .. } = identity;
        let fill = |text: &str| fill(text, identity, dir);
        let interfaces = cfg::strings(&self.assignments, "vif");
        let interfaces =
            interfaces.iter().zip(macs).map(|(spec, mac)| cfg::quoted(&with_mac(&fill(spec), &mac.to_string())));
        let interfaces: Vec<String> = interfaces.collect();
        let vif = if interfaces.is_empty() { String::new() } else { format!("vif = [ {} ]\n", interfaces.join(", ")) };
        format!("{}\nname = {}\nuuid = {}\n{vif}", fill(&text), cfg::quoted(name), cfg::quoted(&uuid.to_string()))
    }
}

/// A network interface in words of xl with another address, and without a name of the host's end.
fn with_mac(spec: &str, mac: &str) -> String {
    let is_kept = |word: &&str| {
        let key = word.split('=').next().unwrap_or_default().trim();
        !word.trim().is_empty() && key != "mac" && key != "vifname"
    };
    let words = spec.split(',').filter(is_kept).map(str::trim);
    [format!("mac={mac}").as_str()].into_iter().chain(words).collect::<Vec<_>>().join(",")
}

/// `text` with what stands for the clone.
fn fill(text: &str, identity: &Identity, dir: &Path) -> String {
    let Identity { id, name, uuid, .. } = identity;
    let text = text.replace("{id}", &id.to_string()).replace("{name}", name).replace("{uuid}", &uuid.to_string());
    text.replace("{dir}", &dir.display().to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::identity::Macs;
    use super::*;

    const JSON: &str = r#"{"c_info": {"type": "pvh", "name": "web", "uuid": "565fda87-6c2f-46f9-bd6d-c6020c938298", "domid": 7},
        "b_info": {"max_vcpus": 2, "target_memkb": 131072, "type.pvh": {}},
        "disks": [{"pdev_path": "/dev/vg/web", "vdev": "xvda", "readwrite": 1}, {"pdev_path": "/iso", "vdev": "xvdb"}],
        "nics": [{"devid": 0, "mac": "00:16:3e:00:00:07", "bridge": "xenbr0", "ifname": "web0"}, {"mac": "00:16:3e:00:00:08"}]}"#;

    fn identity(macs: usize) -> Identity {
        let mut pool = Macs::new(0x10, []);
        Identity {
            id: 3,
            name: "web-3".into(),
            uuid: Uuid::from_u128(5),
            macs: (0..macs).map(|_| pool.draw()).collect(),
        }
    }

    fn template(text: &str) -> Template {
        Template::new(text.to_owned(), Path::new("web.cfg")).unwrap()
    }

    #[test]
    fn a_clone_has_the_parents_configuration_and_an_identity_of_its_own() {
        let config = Config::new(Some(JSON)).unwrap();
        assert_eq!(config.macs(), ["00:16:3e:00:00:07", "00:16:3e:00:00:08"]);
        let clone: Value = serde_json::from_str(&config.for_clone(&identity(2))).unwrap();
        let mut expected: Value = serde_json::from_str(JSON).unwrap();
        expected["c_info"] = json!({"type": "pvh", "name": "web-3", "uuid": "00000000-0000-0000-0000-000000000005"});
        expected["nics"] =
            json!([{"devid": 0, "mac": "00:16:3e:00:00:10", "bridge": "xenbr0"}, {"mac": "00:16:3e:00:00:11"}]);
        assert_eq!(clone, expected);
    }

    #[test]
    fn disks_that_are_written_are_not_shared_by_accident() {
        let config = Config::new(Some(JSON)).unwrap();
        let error = config.check(false).unwrap_err();
        assert!(matches!(&error, ConfigError::Disks { disks, .. } if disks == "/dev/vg/web"), "{error}");
        assert!(config.check(true).is_ok());
        let passed = Config::new(Some(r#"{"c_info": {}, "pcidevs": [{"domain": 0}]}"#)).unwrap();
        assert!(matches!(passed.check(true), Err(ConfigError::PassedThrough("PCI"))));

        let check = |text: &str, clones: usize, shared| {
            let names: Vec<String> = (1..=clones).map(|id| format!("web-{id}")).collect();
            template(text).check(Some(&config), &names, shared).is_ok()
        };
        assert!(!check("disk = ['phy:/dev/vg/web,xvda,w']", 1, false), "the parent's");
        assert!(!check("disk = ['/dev/vg/one,raw,xvda,rw']", 2, false), "everybody's");
        assert!(!check("disk = ['phy:/dev/vg/{id},xvda,w', 'vg/1,raw,xvdb,rw']", 1, false), "twice the same");
        assert!(check("disk = ['/dev/vg/one,raw,xvda,rw']", 1, false));
        assert!(check("disk = ['/dev/vg/one,raw,xvda,rw']", 2, true));
        assert!(check("disk = ['/dev/vg/{name},raw,xvda,rw', 'file:/iso,xvdb:cdrom,r']", 2, false));
        assert!(
            check("disk = ['/dev/vg/web-{id},raw,xvda,rw', ',,xvdb,w']", 2, false),
            "a name that begins as the parent's"
        );
    }

    #[test]
    fn a_clone_does_not_get_the_parents_disk_by_its_number() {
        let config = Config::new(Some(&JSON.replace("/dev/vg/web", "/dev/vg/web-1"))).unwrap();
        let names = ["web-1".to_owned(), "web-2".to_owned()];
        let error =
            template("disk = ['/dev/vg/web-{id},raw,xvda,rw']").check(Some(&config), &names, false).unwrap_err();
        assert!(
            error.to_string().starts_with("the clones would write to /dev/vg/web-1 together and with their parent")
        );
        let nowhere = Config::new(Some(&JSON.replace("/dev/vg/web", ""))).unwrap();
        assert!(template("disk = ['/dev/vg/{id},raw,xvda,rw']").check(Some(&nowhere), &names, false).is_ok());
    }

    #[test]
    fn a_template_is_the_same_machine() {
        let config = Config::new(Some(JSON)).unwrap();
        let check = |text: &str| template(text).check(Some(&config), &[], false);
        assert!(check("memory = 128\nvcpus = 2").is_ok() && check("").is_ok());
        let error = check("memory = 256").unwrap_err().to_string();
        assert_eq!(error, "memory is 256 in web.cfg and 128 in the parent; a clone is the same machine");
        assert!(check("vcpus = 1").is_err() && check("pci = ['03:00.0']").is_err());
    }

    #[test]
    fn a_template_gets_an_identity() {
        let text = "name = 'web'; memory = 128\nvif = [ 'mac=00:16:3e:00:00:07, bridge=xenbr0,vifname=web0',\n '' ]\n\
                    disk = ['/dev/vg/{name},raw,xvda,rw']\ncmdline = \"clone={id} {dir} {other}\"\n";
        let clone = template(text).for_clone(&identity(2), Path::new("/run/3"));
        let assignments = cfg::parse(&clone).unwrap();
        let value = |name| cfg::strings(&assignments, name);
        assert_eq!((value("name"), value("memory")), (vec!["web-3".to_owned()], vec!["128".to_owned()]));
        assert_eq!(value("uuid"), ["00000000-0000-0000-0000-000000000005"]);
        assert_eq!(value("vif"), ["mac=00:16:3e:00:00:10,bridge=xenbr0", "mac=00:16:3e:00:00:11"]);
        assert_eq!(
            (value("disk"), value("cmdline")),
            (vec!["/dev/vg/web-3,raw,xvda,rw".to_owned()], vec!["clone=3 /run/3 {other}".to_owned()])
        );
        assert_eq!(assignments.iter().filter(|assignment| assignment.name == "name").count(), 1);
    }

    #[test]
    fn a_list_of_xl_has_the_configuration() {
        let config = Config::of_list(&format!(r#"[{{"domid": 3, "config": {JSON}}}]"#)).unwrap();
        assert_eq!(config.number("max_vcpus"), Some(2));
        for text in ["", "[]", "{}", "[{}]", "[1]", r#"[{"config": []}]"#] {
            assert!(matches!(Config::of_list(text), Err(ConfigError::Json(_))), "{text}");
        }
        assert!(matches!(Config::new(None), Err(ConfigError::None)));
    }

    /// Any JSON, with the names that are looked for more often than by chance.
    fn any_json() -> impl Strategy<Value = Value> {
        let key = prop_oneof![
            Just("c_info"),
            Just("b_info"),
            Just("nics"),
            Just("disks"),
            Just("mac"),
            Just("readwrite"),
            Just("type.hvm"),
            Just("ms_vm_genid"),
            Just("pcidevs"),
            Just("config"),
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 40, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((key.clone().prop_map(str::to_owned), inner), 0..6)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_configuration_keeps_all_but_its_identity(mut json in any_json()) {
            if let Some(object) = json.as_object_mut() {
                object.insert("c_info".to_owned(), json!({"name": "web"}));
            }
            let text = json.to_string();
            let _ = Config::of_list(&format!("[{text}]"));
            let Ok(config) = Config::new(Some(&text)) else { return Ok(()) };
            let _ = (config.check(false), config.macs());
            let clone = Config::new(Some(&config.for_clone(&identity(2)))).unwrap();
            prop_assert_eq!(&clone.0["c_info"]["name"], "web-3");
            prop_assert_eq!(&clone.0["disks"], &json["disks"]);
        }
    }
}
