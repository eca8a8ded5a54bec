package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// recipeLabel says on an image of what recipe it was made, so that it is made anew only after a change.
const recipeLabel = "locker.recipe"

//go:embed postgres.sh
var postgresScript string

// makeImages makes the images that are not there yet: those of the versions named, or all that can be made.
func makeImages(ctx context.Context, names []string) error {
	if len(names) == 1 && names[0] == "usual" {
		return getUsual(ctx)
	}
	var wanted []version
	for _, v := range versions {
		if v.pull == "" && (len(names) == 0 || slices.Contains(names, v.name())) {
			wanted = append(wanted, v)
		}
	}
	for _, name := range names {
		if v, ok := find(name); !ok || v.pull != "" {
			return fmt.Errorf("no image %s is made: see versions.go", name)
		}
	}
	if _, err := output(ctx, "docker", "version"); err != nil {
		return fmt.Errorf("the images are for Docker: %w", err)
	}
	var errs []error
	for _, v := range wanted { // the others are made although one cannot be had
		if err := v.make(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", v.name(), err))
		}
	}
	return errors.Join(errs...)
}

// getUsual pulls the images that the tests take when no variable names others, or makes theirs.
func getUsual(ctx context.Context) error {
	for _, image := range usual {
		if _, err := output(ctx, "docker", "image", "inspect", image.pull); err == nil {
			continue
		}
		if _, err := output(ctx, "docker", "pull", "--quiet", image.pull); err == nil {
			say("%s is pulled", image.pull)
			continue
		}
		if err := makeImages(ctx, []string{image.made}); err != nil {
			return err
		}
	}
	return nil
}

// make makes the image, if it is not there.
func (v version) make(ctx context.Context) error {
	began := time.Now()
	recipe := v.recipe()
	made, err := output(ctx, "docker", "image", "ls", "-q", "--filter", "label="+recipeLabel+"="+recipe, "--filter", "reference="+v.image())
	if err != nil {
		return err
	}
	if made != "" {
		say("%s is there", v.image())
		return nil
	}
	old, err := output(ctx, "docker", "image", "ls", "-q", v.image())
	if err != nil {
		return err
	}
	folder, err := os.MkdirTemp("", "locker-image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	archive := filepath.Join(folder, "image.tar")
	if v.module != "" {
		err = v.fromModule(ctx, archive)
	} else {
		err = v.fromDebian(ctx, archive)
	}
	if err != nil {
		return err
	}
	changes := append(v.config(), "LABEL "+recipeLabel+"="+recipe)
	args := []string{"import"}
	for _, change := range changes {
		args = append(args, "--change", change)
	}
	if _, err := output(ctx, "docker", append(args, archive, v.image())...); err != nil {
		return err
	}
	if old != "" {
		_, _ = output(ctx, "docker", "image", "rm", old) // it stays as long as a container is made of it
	}
	say("%s is made, in %v", v.image(), time.Since(began).Round(time.Second))
	return nil
}

// recipe is a hash of all that the image is made of, but for the state of the archive that it comes from.
func (v version) recipe() string {
	all := fmt.Sprintf("%q", []any{v.module, v.unpack(), v.config(), runtime.GOARCH})
	return fmt.Sprintf("%x", sha256.Sum256([]byte(all)))[:16]
}

// config makes the image start like the official one: with the server's own arguments.
func (v version) config() []string {
	switch v.server {
	case "etcd":
		return []string{`CMD ["/usr/local/bin/etcd"]`}
	case "postgres":
		return []string{`ENTRYPOINT ["/postgres.sh"]`, "USER 70:70"}
	default:
		return []string{fmt.Sprintf(`ENTRYPOINT ["/usr/bin/%s"]`, v.pkg), "WORKDIR /data"}
	}
}

// links are the folders that Debian has in /usr by now. Older releases may use them too.
const links = `for d in bin sbin lib lib64; do mkdir -p "$1/usr/$d"; ln -s "usr/$d" "$1/$d"; done`

// slim removes what no server needs, which is most of it: PostgreSQL's compiler of queries alone is half of its image.
const slim = `cd "$1"
rm -rf usr/share/doc usr/share/man usr/share/info usr/share/locale usr/share/i18n usr/share/unicode usr/lib/*/gconv var/cache/* var/lib/dpkg
rm -rf usr/bin/perl* usr/share/perl* usr/lib/*/perl* usr/lib/*/libperl* usr/lib/*/libLLVM* usr/lib/llvm* usr/lib/*/libz3.so*
rm -rf usr/lib/postgresql/*/lib/bitcode usr/lib/postgresql/*/lib/llvmjit*
mkdir -p -m 1777 tmp
`

// account gives PostgreSQL, which refuses to be run by root, an account and a folder of its own.
const account = `echo "postgres:x:70:70::/:/bin/sh" >etc/passwd
mkdir -p var/lib/postgresql
chown 70:70 var/lib/postgresql
ln -sf dash usr/bin/sh
`

// unpack is the command that unpacks a package and what it depends on. It does not install them: a server needs no more
// than its files, and that takes a quarter of the time of a system that boots.
func (v version) unpack() []string {
	packages, finish := v.pkg, slim
	if v.server == "postgres" {
		packages += ",dash"
		finish += account + "cat >postgres.sh <<'END'\n" + postgresScript + "END\nchmod 755 postgres.sh\n"
	}
	return []string{
		"mmdebstrap", "--variant=extract", "--quiet", "--include=" + packages, "--setup-hook=" + links, "--extract-hook=" + finish, v.release,
	}
}

// fromDebian unpacks a package with its dependencies. They come from the mirror that this machine's apt is configured to
// use, if it is one of Debian's, on the same conditions.
func (v version) fromDebian(ctx context.Context, archive string) error {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return fmt.Errorf("%w (apt-get install mmdebstrap)", err)
	}
	command := append(v.unpack(), archive)
	mirrors, err := output(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian", "Label: Debian")
	if err != nil {
		return err
	}
	if mirror, _, _ := strings.Cut(mirrors, "\n"); mirror != "" {
		command = append(command, mirror)
	}
	settings, err := output(ctx, "apt-config", "dump", "--format", "%F \"%v\";%n", "Acquire")
	if err != nil {
		return err
	}
	for line := range strings.Lines(settings) {
		if strings.HasPrefix(line, "Acquire::http") || strings.HasPrefix(line, "Acquire::Check-") {
			command = append(command, "--aptopt="+strings.TrimSpace(line))
		}
	}
	unpack := exec.CommandContext(ctx, command[0], command[1:]...)
	if out, err := unpack.CombinedOutput(); err != nil {
		return fmt.Errorf("mmdebstrap: %w\n%s", err, out)
	}
	return nil
}

// fromModule makes an archive that has etcd and nothing else.
func (v version) fromModule(ctx context.Context, archive string) error {
	const server = "go.etcd.io/etcd/server/v3"
	folder := filepath.Dir(archive)
	program := filepath.Join(folder, "etcd")
	module := filepath.Join("..", "tools", "etcd") // has it with its sums
	if pinned, err := output(ctx, "go", "-C", module, "list", "-m", "-f", "{{.Version}}", server); err != nil || pinned != v.module {
		module = folder
		if err := os.WriteFile(filepath.Join(folder, "go.mod"), []byte("module etcd\n\ngo 1.26\n"), 0o600); err != nil {
			return err
		}
		if _, err := output(ctx, "go", "-C", module, "get", "-tool", server+"@"+v.module); err != nil {
			return err
		}
	}
	build := exec.CommandContext(ctx, "go", "build", "-C", module, "-o", program, server)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", build, err, out)
	}
	binary, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	file, err := os.Create(archive)
	if err != nil {
		return err
	}
	w := tar.NewWriter(file)
	err = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "usr/local/bin/etcd", Mode: 0o755, Size: int64(len(binary))})
	if err == nil {
		_, err = w.Write(binary)
	}
	return errors.Join(err, w.Close(), file.Close())
}

// output runs a command, and returns what it prints.
func output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
		}
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }
