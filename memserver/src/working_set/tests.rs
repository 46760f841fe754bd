use descriptor::Gfn;

use super::*;

const IMAGE: ImageId = ImageId::from_bytes([7; 16]);
const FRAMES: PageCount = PageCount::new(1000);

fn learnt() -> Merged {
    let mut merged = Merged::new(IMAGE, FRAMES);
    let order = Arc::new(merged.order());
    let mut witness = descriptor::working_set::Witness::new(FRAMES, order, 1);
    merged.touched(&mut witness, &[FrameRange::new(Gfn::new(10), PageCount::new(5))]);
    merged.ended(&witness, true);
    merged
}

#[test]
fn a_set_is_kept_beside_the_image_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let index = dir.path().join("x.snowidx");
    let set = ImageSet::load(IMAGE, FRAMES, &index);
    assert!(set.order().is_empty());
    set.import(&learnt().encode()).unwrap();
    set.save();
    let mode = std::fs::metadata(dir.path().join("x.snowws")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = ImageSet::load(IMAGE, FRAMES, &index);
    assert_eq!(again.order().frames().count().get(), 5);
    assert_eq!(again.summary(), learnt().summary());
}

#[test]
fn what_cannot_be_used_is_done_without() {
    let dir = tempfile::tempdir().unwrap();
    let (index, file) = (dir.path().join("x.snowidx"), dir.path().join("x.snowws"));
    let bytes = learnt().encode();
    let mut damaged = bytes.clone();
    damaged[100] ^= 1;
    let mut later = bytes.clone();
    later[6] = 9;
    for (content, image, replaced) in [
        (&damaged[..], IMAGE, true),
        (b"hello", IMAGE, true),
        (&bytes, ImageId::from_bytes([8; 16]), true),
        (&later, IMAGE, false),
    ] {
        std::fs::write(&file, content).unwrap();
        let set = ImageSet::load(image, FRAMES, &index);
        assert!(set.order().is_empty());
        assert_eq!(set.file().is_some(), replaced);
    }
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    let set = ImageSet::load(IMAGE, FRAMES, &index);
    assert!(set.order().is_empty() && set.file().is_none());
}

#[test]
fn a_set_of_another_image_is_not_imported() {
    let set = ImageSet::new(ImageId::from_bytes([8; 16]), FRAMES);
    let error = set.import(&learnt().encode()).unwrap_err().to_string();
    assert!(error.contains("0707") && error.contains("0808"), "{error}");
    let set = ImageSet::new(IMAGE, PageCount::new(999));
    assert!(set.import(&learnt().encode()).is_err());
    assert!(matches!(set.import(b"hello"), Err(ImportError::Format(_))));
}

#[test]
fn a_set_is_written_as_its_image_goes_and_not_after() {
    let dir = tempfile::tempdir().unwrap();
    let (index, file) = (dir.path().join("x.snowidx"), dir.path().join("x.snowws"));
    let set = ImageSet::load(IMAGE, FRAMES, &index);
    set.import(&learnt().encode()).unwrap();
    set.retire();
    assert_eq!(Merged::read(&file).unwrap(), learnt());
    std::fs::remove_file(&file).unwrap();
    set.publish();
    assert!(set.save());
    assert!(!file.exists(), "the file is another's by now");
    let set = ImageSet::load(IMAGE, FRAMES, &index);
    set.import(&learnt().encode()).unwrap();
    set.abandon();
    set.retire();
    assert!(!file.exists(), "the image's files are no longer what they were");
}

#[test]
fn what_could_not_be_written_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("later");
    let set = ImageSet::load(IMAGE, FRAMES, &folder.join("x.snowidx"));
    set.import(&learnt().encode()).unwrap();
    assert!(!set.save(), "there is no such folder");
    std::fs::create_dir(&folder).unwrap();
    assert!(set.save());
    assert_eq!(Merged::read(&folder.join("x.snowws")).unwrap(), learnt());
}
