//! Disks in words of xl (xl-disk-configuration(5)).

/// Prefixes of former days, which say how a target is to be read.
const PREFIXES: [&str; 12] =
    ["raw:", "qcow2:", "qcow:", "vhd:", "qed:", "tapdisk:", "tap2:", "tap:", "aio:", "ioemu:", "file:", "phy:"];

/// Whether a disk is written to: it is, unless something says otherwise.
pub(super) fn is_written(spec: &str) -> bool {
    let mut words = spec.split(',').map(str::trim);
    !words.any(|word| {
        matches!(word, "r" | "ro" | "cdrom" | "devtype=cdrom" | "access=r" | "access=ro") || word.ends_with(":cdrom")
    })
}

/// What a disk is on: a device or a file of the host; empty where there is nothing.
pub(super) fn target(spec: &str) -> String {
    // It is the last of the words, and may have commas in it.
    if let Some((_, target)) = spec.split_once("target=") {
        return absolute(target.trim());
    }
    let is_key =
        |word: &str| word.split_once('=').is_some_and(|(key, _)| key.bytes().all(|byte| byte.is_ascii_lowercase()));
    let target = spec.split(',').map(str::trim).find(|word| !is_key(word)).unwrap_or_default();
    absolute(target)
}

/// A target as a path: a name without one is a device.
pub(super) fn absolute(target: &str) -> String {
    let mut target = target;
    while let Some(rest) = PREFIXES.iter().find_map(|prefix| target.strip_prefix(prefix)) {
        target = rest;
    }
    if target.is_empty() || target.starts_with('/') { target.to_owned() } else { format!("/dev/{target}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_found_in_all_the_ways_of_writing_them() {
        let specs = [
            "/dev/vg/web,raw,xvda,rw",
            "phy:/dev/vg/web,xvda,w",
            "phy:vg/web,xvda,w",
            "format=raw, vdev=xvda, access=rw, target=/dev/vg/web",
            "vdev=xvda,/dev/vg/web",
            "tap:aio:/dev/vg/web,xvda,w",
        ];
        assert_eq!(specs.map(target), ["/dev/vg/web"; 6].map(str::to_owned));
        assert_eq!([",,xvdb:cdrom,r", ""].map(target), ["", ""]);
    }

    #[test]
    fn disks_are_written_to_unless_something_says_otherwise() {
        let written = ["/a,raw,xvda,rw", "/a,xvda", "phy:/a,xvda,w", "vdev=xvda,target=/a"];
        assert!(written.into_iter().all(is_written));
        let read = [
            "/a,raw,xvda,r",
            "file:/a,xvdb:cdrom",
            "vdev=hdc,devtype=cdrom,target=/a",
            "access=ro,vdev=xvda,target=/a",
        ];
        assert!(!read.into_iter().any(is_written));
    }
}
