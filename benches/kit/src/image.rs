//! Images to measure with.

use std::path::PathBuf;

use descriptor::image::{Extent, ExtentTable, ImageFile, ImageIndex};
use descriptor::memory::{MemoryMap, PageSize, Region, RegionKind};
use descriptor::vm::{Hypervisor, Identity};
use descriptor::{Descriptor, FrameRange, FrameSet, Gfn, ImageId, PAGE_SIZE, PageCount};

/// An image of incompressible pages, none of them zero, in a file in memory.
pub struct RandomImage {
    /// Its name.
    pub id: ImageId,
    /// The contents.
    pub bytes: Vec<u8>,
    /// The file with the contents.
    pub path: PathBuf,
    /// The image index.
    pub index_path: PathBuf,
    /// The descriptor.
    pub descriptor_path: PathBuf,
    _folder: tempfile::TempDir,
}

impl RandomImage {
    /// An image of `mib` MiB.
    pub fn make(mib: u64) -> anyhow::Result<Self> {
        let memory_file_system = PathBuf::from("/dev/shm");
        let folder =
            if memory_file_system.is_dir() { tempfile::tempdir_in(memory_file_system)? } else { tempfile::tempdir()? };
        let mut bytes = vec![0; (mib << 20) as usize];
        fastrand::Rng::with_seed(mib).fill(&mut bytes);
        let path = folder.path().join("memory");
        std::fs::write(&path, &bytes)?;

        let frames = FrameRange::new(Gfn::new(0), PageCount::new((mib << 20) / PAGE_SIZE));
        let region = Region { name: "ram".to_owned(), frames, kind: RegionKind::Ram, page_size: PageSize::Base };
        let memory = MemoryMap::new(vec![region])?;
        let id = ImageId::from_bytes(*b"bench image 0001");
        let extent = Extent { frames, file: 0, offset: 0, stride: PAGE_SIZE as u32 };
        let length = bytes.len() as u64;
        let nothing = FrameSet::empty(memory.universe());
        let index = ImageIndex {
            image: id,
            memory: memory.clone(),
            files: vec![ImageFile { path: path.clone(), length }],
            extents: ExtentTable::new(vec![extent], &[length])?,
            zero: nothing.clone(),
        };
        let descriptor = Descriptor {
            identity: Identity {
                image: id,
                parent: "bench".to_owned(),
                hypervisor: Hypervisor::Raw,
                hypervisor_version: String::new(),
                machine: String::new(),
                captured_unix_ns: 0,
                pause_us: None,
            },
            memory,
            records: Vec::new(),
            eager: nothing.clone(),
            zero: nothing.clone(),
            free: nothing,
            prefetch: Vec::new(),
            servers: Vec::new(),
        };
        let (index_path, descriptor_path) = (folder.path().join("image.snowidx"), folder.path().join("image.snow"));
        index.write(&index_path)?;
        descriptor.write(&descriptor_path)?;
        Ok(Self { id, bytes, path, index_path, descriptor_path, _folder: folder })
    }
}
